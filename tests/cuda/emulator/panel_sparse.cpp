#include KERNEL
static const unsigned short *V, *X; static const unsigned* M; static const int *C, *S; static float* Y; static int R, T;
extern "C" int go(const unsigned short* v, const unsigned* m, const int* c, const int* s, const unsigned short* x, float* y, int r, int t, unsigned seed) {
    V=v; M=m; C=c; S=s; X=x; Y=y; R=r; T=t;
    return emu_run((r + 15) / 16, (t + 7) / 8, seed, [] { panel_sparse(V, M, C, S, X, Y, R, T); }); }
