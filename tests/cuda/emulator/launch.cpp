// One kernel as a library with an interface like the driver's: -DKERNEL="path.cu" -DENTRY=name, and its definitions.
#include KERNEL

namespace {
template <class T>
struct Parameter {
    static T read(void* given) { return *static_cast<T*>(given); }
};
template <class T>
struct Parameter<emu::Pointer<T>> {
    static emu::Pointer<T> read(void* given) {
        emu::Pointer<T> pointer;
        pointer.buffer = emu::global_buffer(*static_cast<void**>(given), &pointer.at);
        return pointer;
    }
};

void** given;
template <class... A, size_t... I>
void call(void (*kernel)(A...), std::index_sequence<I...>) {
    kernel(Parameter<A>::read(given[I])...);
}
template <class... A>
void call(void (*kernel)(A...)) {
    call(kernel, std::index_sequence_for<A...>());
}
}  // namespace

// Launch as cuLaunchKernel does; 1 for a failure. `left_out` names a barrier or wait of `emu_sites`, or is empty.
extern "C" __attribute__((visibility("default"))) int emu_launch(int gx, int gy, int gz, int bx, int by, int bz, size_t shared,
                                                                 void** parameters, unsigned seed, const char* left_out) {
    given = parameters;
    return emu::run_grid({gx, gy, gz}, {bx, by, bz}, shared, seed, left_out, [] { call(ENTRY); }) ? 0 : 1;
}
