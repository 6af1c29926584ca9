"""`explain`: what `torch.compile(model, backend="sparse")` would do with a model, without compiling it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import OptimizeContext, OptimizedModule, innermost_backend
from torch.utils._python_dispatch import _disable_current_modes

from sparsecomp.analysis import DryRun, analyse
from sparsecomp.frontends.fx_expand import settle
from sparsecomp.log import DebugFolder, log
from sparsecomp.options import Options
from sparsecomp.patterns import Pattern
from sparsecomp.planner import Plan
from sparsecomp.report import Report
from sparsecomp.targets.base import Target
from sparsecomp.valueless import runnable


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    options: Mapping[str, Any] | Options | None = None,
    target: str | Target | None = None,
    assume: str | Pattern | None = None,
    **kwargs: Any,
) -> Report:
    """Report what every linear layer of a model could become, at what cost, what would be chosen, and why.

    The model runs once as it is, in eager mode without gradients, under Dynamo, which gives the graphs that the backend
    would get; no kernel is built or run unless the options ask for `autotune`. In training mode that run does what any
    run does (it updates the statistics of batch normalisation); the state of the random generator is kept.

    For a target that is not here (`arm:cortex-a76` on a PC) the choices are what its prices say, with as many threads
    as PyTorch has here. The model and its inputs may be on the meta device, or fake tensors: no memory is needed then,
    and where weights have no values their zeros are unknown, unless a pattern is assumed. What runs is then a copy of a
    module on the meta device.

    Args:
        model: a module or function, or what `torch.compile` made of it: its options are then used.
        *inputs: what the model is called with; their shapes are what the costs are for.
        options: of the backend, as in `torch.compile`; before those of a compiled model.
        target: such as `"arm:cortex-a76"`; that of the options if None.
        assume: pattern that all weights are taken to satisfy, such as `"2:4"`; None: what they hold counts.
        **kwargs: what the model is called with by name.

    Returns:
        The report; print it, or see `Report.to_dict`, `to_html` and `plan`.

    Raises:
        ValueError: an option is unknown or has a bad value.
        TypeError: the model cannot be called.
        RuntimeError: the model cannot run on these inputs; Dynamo's message says where.
    """
    if not callable(model):
        raise TypeError(f"expected a module or a function to explain, given {type(model).__name__} {model!r:.60}")
    original, found = _unwrap(model)
    parsed = found if options is None else Options.parse(options)
    if target is not None:
        parsed = parsed.replace(target=Options.parse({"target": target}).target)
    tensors = [*inputs, *kwargs.values(), *(original.parameters() if isinstance(original, nn.Module) else ())]
    session = _Session(
        parsed, parsed.resolve_target(tensors), DryRun(None if assume is None else Pattern.parse(assume))
    )
    session.report.notes += [*_gradient_note(original, inputs, kwargs), *_recurrent_note(original)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        # A region of its own and static shapes: neither the user's compiled code nor its limits on recompiling are
        # touched.
        compile_model: Any = torch.compile  # whose overloads do not know all of its arguments
        with runnable(original, inputs, kwargs) as (run, args, named):
            compiled = compile_model(_caller(run), backend=session.backend, dynamic=False, isolate_recompiles=True)
            compiled(*args, **named)
    session.finish()
    return session.report


_SHOWN = 3
"""Names that a note lists."""


class _Session:
    """Collects the choices for the graphs that Dynamo finds in one run of a model."""

    def __init__(self, options: Options, target: Target, dry: DryRun) -> None:
        self._options, self._target, self._dry = options, target, dry
        plan = Plan(target.name, threads=torch.get_num_threads())
        self.report = Report(plan, target=target.description or target.name, graphs=0)
        self._blocks: set[str] = set()

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """A backend that leaves the graph to eager mode and plans when it runs.

        Not when it is compiled: Dynamo runs the graph of one module also for others of its class, with their weights.
        """
        self.report.graphs += 1
        planned: set[tuple[int, ...]] = set()
        # Where the inputs come from, which Dynamo forgets when it is done with the graph.
        origins = {
            node: node.meta["grapharg"] for node in gm.graph.find_nodes(op="placeholder") if "grapharg" in node.meta
        }

        def run(*args: Any) -> Any:
            parameters = {place: value for place, value in enumerate(args) if isinstance(value, nn.Parameter)}
            key = tuple(map(id, parameters.values()))
            if key not in planned:
                planned.add(key)
                for node, origin in origins.items():
                    node.meta["grapharg"] = origin
                with _disable_current_modes():  # one of fake tensors may be active
                    self._plan(gm, [parameters.get(place, example) for place, example in enumerate(example_inputs)])
            return gm.forward(*args)

        return run

    def _plan(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        try:
            analysis = analyse(gm, inputs, self._options, self._target, DebugFolder(), self._dry)
            self.report.plan.sites += analysis.choices
            self._note(analysis.reasons)
            self._note([f"mixture of experts {block}" for block in analysis.graph.moes])
            self._blocks |= {ffn.name for ffn in analysis.graph.ffns}
            settle(gm, analysis.expansions)
        except Exception as error:  # noqa: BLE001 -- logged with its traceback
            log.warning("a graph would run dense: its analysis failed", exc_info=True)
            self._note([f"a graph would run dense: its analysis failed with {type(error).__name__}: {error}"])

    def finish(self) -> None:
        """Add what only the whole run tells."""
        names = [choice.name for choice in self.report]
        if unknown := sorted(set(self._options.skip or ()) - set(names) - self._blocks - {""}):
            more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
            self._note(
                [f"the skip plan is also for {', '.join(unknown[:_SHOWN])}{more}, which the model does not have"]
            )
        if len(set(names)) < len(names):
            self._note(["Dynamo compiles parts of the model on their own; names of layers are relative to such a part"])
        if not self.report.graphs:
            self._note(
                ["Dynamo found no graph in this call; is it disabled (TORCHDYNAMO_DISABLE, torch.compiler.disable)?"]
            )

    def _note(self, notes: Sequence[str]) -> None:
        self.report.notes += [note for note in notes if note not in self.report.notes]


def _caller(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls the model and whose code no other function shares.

    Dynamo keeps what it compiles with the code, so that it goes when the function goes.
    """
    if isinstance(model, types.FunctionType) and not hasattr(model, "_torchdynamo_disable"):
        function = model  # no wrapper around it, which would show in the names of the layers
    else:
        function = _wrapper(model)
    code = function.__code__.replace(co_name=f"explained_{function.__name__}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _wrapper(model: Callable[..., Any]) -> types.FunctionType:
    def function(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return cast("types.FunctionType", function)


def _unwrap(model: Callable[..., Any]) -> tuple[Callable[..., Any], Options]:
    """The model below `torch.compile`, and the options that it was compiled with for this backend."""
    if isinstance(model, OptimizedModule) and isinstance(model.dynamo_ctx, OptimizeContext):
        original: Callable[..., Any] = model._orig_mod
        return original, _options_of(model.dynamo_ctx)
    context = _context(getattr(model, "_compiled_call_impl", None) if isinstance(model, nn.Module) else model)
    if context is None:
        return model, Options()
    return getattr(model, "_torchdynamo_orig_callable", model), _options_of(context)


def _context(function: Any) -> OptimizeContext | None:
    """The Dynamo context of a compiled function, which only its closure holds; None if it is not compiled."""
    if not hasattr(function, "_torchdynamo_orig_callable") or not isinstance(function, types.FunctionType):
        return None
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # an empty cell
            continue
        if isinstance(value, OptimizeContext):
            return value
    return None


def _options_of(context: OptimizeContext) -> Options:
    from sparsecomp.backend import sparse

    callback: Any = context.callback
    backend: Any = innermost_backend(callback) if callable(callback) else None
    if getattr(backend, "compiler_fn", None) is not sparse:
        return Options()
    arguments = backend.kwargs
    return Options.parse(arguments.get("options"), arguments.get("mode"))


def _recurrent_note(model: Callable[..., Any]) -> list[str]:
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    names = [name or "the model" for name, module in modules if isinstance(module, nn.RNNBase)]
    if not names or torch._dynamo.config.allow_rnn:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [
        f"Dynamo leaves functions that use an RNN, GRU or LSTM ({', '.join(names[:_SHOWN])}{more}) to eager mode, with "
        "the other layers that they call themselves; torch._dynamo.config.allow_rnn = True lets it take them"
    ]


def _gradient_note(model: Callable[..., Any], inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    if not torch.is_grad_enabled():
        return []
    parameters: Iterator[Tensor] = model.parameters() if isinstance(model, nn.Module) else iter(())
    arguments = (value for value in (*inputs, *kwargs.values()) if isinstance(value, Tensor))
    if not any(value.requires_grad for value in (*parameters, *arguments)):
        return []
    return [
        "gradients are enabled here and the model requires them: such a call runs dense, under Inductor; "
        "the sparse kernels run under torch.no_grad() or torch.inference_mode()"
    ]
