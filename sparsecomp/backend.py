"""The `torch.compile` backend `sparse`: choose, rewrite the sites that win, and leave all else to Inductor.

Whatever cannot be rewritten runs as under Inductor and says why. A mistake of this package must not break a model that
Inductor compiles: it is logged with its traceback, and Inductor gets the graph as Dynamo made it. Only bad options are
the user's to hear.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import RestartAnalysis, ShortenTraceback, SkipFrame, TensorifyScalarRestartAnalysis
from torch.utils._python_dispatch import _disable_current_modes

from sparsecomp.analysis import Analysis, PlannedSite, SiteChooser, StaysDense, analyse, gradient_reason
from sparsecomp.blocks import FfnSite
from sparsecomp.experts_runtime import ReadyExperts, in_experts, rewrite_experts
from sparsecomp.frontends.fx import Replacement, apply
from sparsecomp.frontends.fx_expand import settle
from sparsecomp.frontends.fx_guards import guard_weight
from sparsecomp.frontends.fx_pool import use_pools
from sparsecomp.frontends.inductor import register_lowerings
from sparsecomp.ir import ConvSite, LinearSite, Site
from sparsecomp.log import CODE, GRAPHS, PLAN, DebugFolder, log
from sparsecomp.options import Options
from sparsecomp.planner import Plan, SiteChoice
from sparsecomp.runtime.block_site import RuntimeBlock
from sparsecomp.runtime.conv_site import HeldTerms, RuntimeConv
from sparsecomp.runtime.device_ffn import DeviceSkip
from sparsecomp.runtime.device_site import DeviceSite
from sparsecomp.runtime.ffn_site import RuntimeSkip
from sparsecomp.runtime.site import RuntimeSite
from sparsecomp.runtime.weight_site import Seen
from sparsecomp.skip_runtime import runtime_skip
from sparsecomp.targets.base import DENSE, ConvEpilogue, Target
from sparsecomp.verify import difference

Compiled = Callable[..., Any]
Runtime = RuntimeSite | DeviceSite | RuntimeConv | RuntimeSkip | DeviceSkip | RuntimeBlock
Rewritten = tuple[Site | FfnSite, Runtime]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.int8: 0.0}
"""`verify`: the largest difference from dense, relative to the largest value of the dense output."""

HISTORY = 256


class OptionError(ShortenTraceback, ValueError):
    """Bad options, as Dynamo lets them through to the user.

    Dynamo wraps what a backend raises into BackendCompilerFailed, which is no ValueError, unless it is a
    `ShortenTraceback`.
    """


@dataclass
class Compilation:
    """What the backend did with one graph; it holds no tensor.

    Attributes:
        plan: the choices for its sites.
        rewritten: names of the sites that run sparse kernels.
        reasons: what concerns the graph as a whole: why it runs dense, and what failed.
        packed_bytes: bytes of the packed weights of the rewritten sites.
        dense_bytes: bytes of the same weights in the model.
        seconds: that the package's own work took, Inductor left out.
    """

    plan: Plan
    rewritten: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    packed_bytes: int = 0
    dense_bytes: int = 0
    seconds: float = 0.0


_history: deque[Compilation] = deque(maxlen=HISTORY)
_history_lock = threading.Lock()


def compilations() -> list[Compilation]:
    """What the backend did in this process, oldest first; the last `HISTORY` graphs."""
    with _history_lock:
        return list(_history)


def sparse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Compile a graph for Dynamo; used as `torch.compile(model, backend="sparse", options={...})`.

    Args:
        gm: Dynamo's graph.
        example_inputs: one for each of its placeholders.
        options: as `sparsecomp.Options` has them.
        mode: `"max-autotune"` means `options={"autotune": True}`.

    Returns:
        A callable that takes the graph's inputs.

    Raises:
        ValueError: an option is unknown or has a bad value, or the target that was named cannot run on this machine.
    """
    try:
        parsed = Options.parse(options, mode)
    except ValueError as error:
        raise OptionError(str(error), first_useful_frame=inspect.currentframe()) from None
    try:
        target = parsed.resolve_target(example_inputs)
        if (missing := target.why_not_here()) is not None:
            raise ValueError(f"target {target.name} cannot run here: {missing}; sparsecomp.explain and plan take it")
    except ValueError as error:
        if parsed.target is not None:
            raise OptionError(str(error), first_useful_frame=inspect.currentframe()) from None
        # Nobody asked for a target: hardware that none is for, such as an old card, runs as under Inductor.
        return _dense(gm, example_inputs, f"no target for this hardware: {error}")
    return compile_graph(gm, example_inputs, parsed, target)


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, target: Target) -> Compiled:
    """Compile a graph with options that are known to be right; see `sparse`."""
    start = time.perf_counter()
    debug = DebugFolder()
    compilation = Compilation(Plan(target.name, threads=torch.get_num_threads()))
    rewrite = _Rewrite(gm, compilation, debug)
    compiled = None
    try:
        if (reason := gradient_reason(gm, example_inputs)) is not None:
            compilation.reasons.append(reason)
        else:
            rewrite.save()
            rewrite.run(analyse(gm, example_inputs, options, target, debug), options, target)
    except Exception as error:  # noqa: BLE001 -- logged with its traceback
        log.warning("the graph runs dense: its analysis failed", exc_info=True)
        rewrite.undo(f"the analysis failed with {type(error).__name__}: {error}")
    compilation.seconds = time.perf_counter() - start

    if rewrite.sites or rewrite.experts:
        try:
            compiled = _inductor(gm, example_inputs)
        except (RestartAnalysis, TensorifyScalarRestartAnalysis, SkipFrame):
            raise  # these tell Dynamo what to do next
        except Exception as error:  # noqa: BLE001 -- logged with its traceback
            log.warning("the graph runs dense: Inductor did not compile the rewritten graph", exc_info=True)
            rewrite.undo(f"Inductor did not compile the rewritten graph: {type(error).__name__}: {error}")
    if compiled is None:
        compiled = _inductor(gm, example_inputs)
    _record(compilation, debug)
    return _with_fresh_weights(compiled, rewrite.sites, rewrite.experts)


def _dense(gm: fx.GraphModule, example_inputs: Sequence[Any], reason: str) -> Compiled:
    """What Inductor makes of the graph, with the reason in the record."""
    compilation = Compilation(Plan("none", threads=torch.get_num_threads()), reasons=[reason])
    _record(compilation, DebugFolder())
    return _inductor(gm, example_inputs)


def _inductor(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    from torch._inductor.compile_fx import compile_fx

    register_lowerings()
    compiled: Any = compile_fx(gm, list(example_inputs))
    return compiled


def _with_fresh_weights(compiled: Compiled, sites: list[Rewritten], experts: list[ReadyExperts]) -> Compiled:
    """Let every site look at its weight before each call: it may have changed, or be another module's.

    Experts look themselves, at those that a call picks.
    """
    if not sites and not experts:
        return compiled
    watched = tuple((_sources(site), runtime.refresh) for site, runtime in sites)
    every = tuple(source for sources, _ in watched for source in sources)
    here = threading.local()

    def call(*args: Any) -> Any:
        # One look at all of them takes a tenth of the time of one look for each site.
        values = [held if held is not None else args[index] for index, held in every]
        seen: Seen | None = getattr(here, "seen", None)
        if seen is None or not seen.are(values):
            for sources, refresh in watched:
                refresh(*[held if held is not None else args[index] for index, held in sources])
            here.seen = Seen(values)
        return compiled(*args)

    # The op finds its sites in a weak table: they live as long as the code that calls them.
    call.sites = (*(runtime for _, runtime in sites), *(ready.runtime for ready in experts))  # type: ignore[attr-defined]
    return call


def _sources(site: Site | FfnSite) -> list[tuple[int, Tensor | None]]:
    """What a site looks at before each call: the index of an input of the graph, or a tensor that the graph holds."""
    if isinstance(site, FfnSite):
        found = [(linear.weight_index, linear.weight) for linear in site.linears]
    else:
        held = (site.held or ()) if isinstance(site, ConvSite) else ()
        found = [(site.weight_index, site.weight), *held]
    return [(index, None if index >= 0 else tensor) for index, tensor in found]


class _Rewrite:
    """Rewrites a graph, and puts it back as it was.

    Attributes:
        sites: what was rewritten.
        experts: the experts that were.
    """

    def __init__(self, gm: fx.GraphModule, compilation: Compilation, debug: DebugFolder) -> None:
        self.sites: list[Rewritten] = []
        self.experts: list[ReadyExperts] = []
        self._gm, self._compilation, self._debug = gm, compilation, debug
        self._original: fx.Graph | None = None

    def save(self) -> None:
        """Remember the graph as it is now."""
        self._original = _copy(self._gm.graph)

    def run(self, analysis: Analysis, options: Options, target: Target) -> None:
        """Pack the weights of the sites that won and put the sparse op in their places."""
        compilation = self._compilation
        compilation.reasons += analysis.reasons
        inside = in_experts(analysis)
        self.experts = rewrite_experts(
            self._gm, analysis, target, options.verify, lambda planned: _runtime_site(planned, options, target)
        )
        compilation.plan.add(analysis.choices)
        sites: list[Rewritten] = []
        skipping = inside | {id(planned.site) for skip in analysis.skips for planned in skip.linears}
        for skip in analysis.skips:
            if id(skip.linears[0].site) in inside:
                continue
            ready, reason = runtime_skip(skip, target, options.verify)
            if ready is not None:
                sites.append((skip.site, ready))
            else:
                compilation.plan.add(_left_dense(planned.choice, reason) for planned in skip.linears)
        for planned in analysis.sites:
            if id(planned.site) in skipping:
                continue
            if planned.chooser is not None and not planned.choice.chosen.is_dense:
                packed, reason = _runtime_site(planned, options, target)
                if packed is not None:
                    sites.append((planned.site, packed))
                else:
                    compilation.plan.add([_left_dense(planned.choice, reason)])
        linears = [linear for site, _ in sites for linear in _parts(site)]
        own = [planned for ready in self.experts for planned in ready.linears]
        self._guard_dense(analysis, {site.name for site in linears} | {planned.site.name for planned in own})
        compilation.rewritten += [planned.site.name for planned in own if not planned.choice.chosen.is_dense]
        compilation.packed_bytes += sum(ready.runtime.nbytes for ready in self.experts)
        compilation.dense_bytes += sum(p.site.weight.numel() * p.site.weight.element_size() for p in own)
        settle(self._gm, analysis.expansions, {site.composite for site in linears if site.composite}, linears)
        if not sites:
            return
        if self._debug.wants(GRAPHS):
            self._debug.write(GRAPHS, "fx_before.py", self._gm.print_readable(print_output=False))
        skips = RuntimeSkip | DeviceSkip | RuntimeBlock
        replaced = [Replacement(site, runtime.handle, isinstance(runtime, skips)) for site, runtime in sites]
        apply(self._gm, replaced)
        use_pools(self._gm, replaced, target)
        self.sites = sites
        if self._debug.wants(GRAPHS):
            self._debug.write(GRAPHS, "fx_after.py", self._gm.print_readable(print_output=False))
        for site, runtime in sites:
            compilation.rewritten.append(site.name)
            compilation.packed_bytes += runtime.nbytes
            compilation.dense_bytes += sum(part.weight.numel() * part.weight.element_size() for part in _parts(site))
            if self._debug.wants(CODE):
                self._debug.write(CODE, f"code_{site.name}.txt", runtime.source)

    def _guard_dense(self, analysis: Analysis, rewritten: set[str]) -> None:
        """Compile anew for a module of the same class whose weights would not be left dense."""
        for planned in analysis.sites:
            site, chooser = planned.site, planned.chooser
            if chooser is not None and site.weight_index >= 0 and site.name not in rewritten:
                stays = StaysDense(site, chooser)
                guard_weight(self._gm, site.weight_index, stays, f"the weight of {site.name} is best left dense")

    def undo(self, reason: str) -> None:
        """Put the graph back and make every choice dense."""
        compilation = self._compilation
        compilation.reasons.append(reason)
        compilation.plan.add(_left_dense(choice, reason) for choice in compilation.plan if not choice.chosen.is_dense)
        compilation.rewritten, compilation.packed_bytes, compilation.dense_bytes = [], 0, 0
        self.sites, self.experts = [], []
        if self._original is not None:
            self._gm.graph = self._original
            self._gm.recompile()


def _parts(site: Site | FfnSite) -> tuple[Site, ...]:
    """The sites that hold the weights of what is rewritten."""
    return site.linears if isinstance(site, FfnSite) else (site,)


def _left_dense(choice: SiteChoice, reason: str) -> SiteChoice:
    return replace(choice, chosen=DENSE, reason=f"dense: {reason}", declined=True)


def _copy(graph: fx.Graph) -> fx.Graph:
    """A copy of Dynamo's graph that Dynamo and AOTAutograd take for the original."""
    copy = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph, nodes)
    if output is not None:
        copy.output(output)
    for old, new in nodes.items():
        # AOTAutograd reads this attribute, which is no part of the metadata that a copy keeps.
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copy


def _runtime_site(
    planned: PlannedSite, options: Options, target: Target
) -> tuple[RuntimeSite | DeviceSite | RuntimeConv | None, str]:
    """Pack the weight of a site; None and the reason if that fails or if `verify` finds a difference."""
    site, choice = planned.site, planned.choice
    if planned.chooser is None:
        return None, choice.reason
    try:
        with _disable_current_modes(), torch.no_grad():
            # Packs and builds now, where a failure can still be answered with dense.
            runtime = _prepared(site, planned.chooser, target)
            found = difference(site, runtime) if options.verify else 0.0
    except Exception as error:  # noqa: BLE001 -- logged with its traceback
        log.warning("site %s stays dense: preparing %s failed", site.name, choice.chosen, exc_info=True)
        return None, f"preparing {choice.chosen} failed with {type(error).__name__}: {error}"
    limit = TOLERANCE[site.dtype]
    # Written so that a NaN counts as a difference.
    if not found <= limit:
        reason = f"verify: {choice.chosen} differs from dense by {found:.2g} of its largest value, more than {limit:g}"
        log.error("site %s stays dense: %s; please report this", site.name, reason)
        return None, reason
    return runtime, choice.reason


def _prepared(site: Site, chooser: SiteChooser, target: Target) -> RuntimeSite | DeviceSite | RuntimeConv:
    residual = site.residual is not None
    if isinstance(site, LinearSite):
        kind = RuntimeSite if target.fuses else DeviceSite
        linear = kind(site.name, site.weight, site.transposed, target, chooser, site.activation)
        linear.prepare(site.tokens, residual)
        return linear
    if site.window is None:
        raise ValueError(f"convolution {site.name} has no window")
    epilogue = ConvEpilogue(site.activation, site.residual_first)
    held = None if site.held is None else HeldTerms(site.term_names, site.norm, site.bias)
    conv = RuntimeConv(site.name, site.weight, site.window, target, chooser, epilogue, held)
    conv.prepare(site.maps, residual)
    return conv


def _record(compilation: Compilation, debug: DebugFolder) -> None:
    with _history_lock:
        _history.append(compilation)
    choices: list[SiteChoice] = compilation.plan.sites
    log.info(
        "%d of %d sites run sparse kernels on %s; packed weights %d bytes, dense %d; planned in %.2f s",
        len(compilation.rewritten),
        len(choices),
        compilation.plan.target,
        compilation.packed_bytes,
        compilation.dense_bytes,
        compilation.seconds,
    )
    for reason in compilation.reasons:
        log.info("graph: %s", reason)
    for choice in choices:
        log.info("%s: %s", choice.name, choice.reason)
        for item in choice.predictions:
            log.debug("%s: %s predicted %.4g us, measured %s", choice.name, item.candidate, item.us, item.measured_us)
    if debug.wants(PLAN):
        debug.write(PLAN, "plan.json", compilation.plan.to_json())
        lines = [f"graph: {reason}" for reason in compilation.reasons]
        lines += [f"{choice.name}: {choice.reason}" for choice in choices]
        debug.write(PLAN, "plan.txt", "\n".join(lines) + "\n")
