"""The choice of a pattern for every site of a plan under a budget, by the knapsack over the options that it holds."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

from sparsecomp.planner.budget import Budget, milliseconds
from sparsecomp.planner.choose import MARGIN
from sparsecomp.planner.knapsack import Item, solve
from sparsecomp.planner.plan import Option, Plan, Prediction, SiteChoice
from sparsecomp.planner.skips import SkipForm
from sparsecomp.targets.base import DENSE, DEPTHWISE


@dataclass(frozen=True)
class Group:
    """The entries of a plan that share one weight: one, or every call of a module that runs more than once.

    Attributes:
        name: of the module.
        options: what the weight may be pruned to, as it is first; microseconds are those of all entries together.
        block: name of the FFN block that it is in; empty for none.
    """

    name: str
    options: tuple[Option, ...]
    block: str = ""

    def bond(self, option: Option) -> tuple[str, SkipForm] | None:
        """What options of several groups have in common that are chosen together or not at all.

        Those are the forms in which a block skips as one. `block` is one of all blocks that take part: the others would
        be skipped for other tokens without one of them.
        """
        form = option.skip
        if form is None or not form.of_block:
            return None
        return ("" if form.kind == "block" else self.block), form


def module_name(site: SiteChoice) -> str:
    """The module of an entry: the suffix after # counts the calls of one."""
    return site.name.partition("#")[0]


def groups_of(plan: Plan) -> list[Group]:
    """What can be chosen in a plan.

    Raises:
        ValueError: there is nothing, or the entries of one module do not offer the same.
    """
    merged: dict[str, list[Option]] = {}
    blocks: dict[str, str] = {}
    for site in plan:
        if not site.options:
            continue
        name = module_name(site)
        blocks[name] = site.block.partition("#")[0]
        known = merged.setdefault(name, [replace(option, us=0.0) for option in site.options])
        if [(o.prune, o.skip, o.loss) for o in known] != [(o.prune, o.skip, o.loss) for o in site.options]:
            raise ValueError(f"the entries of {name!r} in the plan offer different options")
        merged[name] = [replace(a, us=a.us + b.us) for a, b in zip(known, site.options, strict=True)]
    if not merged or plan.summary is None:
        raise ValueError("the plan holds no options to choose from: it was not made by sparsecomp.plan")
    return [Group(name, tuple(options), blocks[name]) for name, options in merged.items()]


def select(plan: Plan, budget: Budget) -> Plan:
    """Choose what every site of a plan is pruned to.

    Under a quality budget the latency is minimised, under a latency or speed-up budget the loss.

    Raises:
        ValueError: the budget cannot be reached, with the best that can be; or there is nothing to choose from.
    """
    groups = groups_of(plan)
    summary = plan.summary
    assert summary is not None
    if budget.kind == "max_quality_loss":
        picked = solve(_items(groups, limit_loss=True), budget.value)
        if picked is None:
            least = sum(min(option.loss for option in group.options) for group in groups)
            raise ValueError(f"a {budget} cannot be reached: the least is {least:.3g}")
    else:
        limit = 1e6 * budget.value if budget.kind == "max_latency" else summary.dense_us / budget.value
        items, left = _items(groups, limit_loss=False), summary.parts_us(limit) - summary.rest_us
        picked = solve(items, left + depthwise_gain(plan))
        if picked is not None and not _channels_first(plan, _chosen(groups, picked)):
            picked = solve(items, left)
        if picked is None:
            raise ValueError(_unreachable(plan, budget))
    return with_choice(plan, budget, _chosen(groups, picked))


def replan(plan: Plan, budget: Budget) -> Plan:
    """`select`, for a budget that something can be pruned under.

    Raises:
        ValueError: as `select`, or a quality budget leaves nothing to prune.
    """
    chosen = select(plan, budget)
    if budget.kind == "max_quality_loss" and not any(site.prune or site.skip for site in chosen):
        least = mildest(plan)
        assert least.summary is not None
        raise ValueError(
            f"under a {budget} no layer can be pruned: the least that is estimated to gain anything loses "
            f"{least.summary.estimated_loss:.3g}, for {milliseconds(least.summary.planned_us)} instead of "
            f"{milliseconds(least.summary.dense_us)}"
        )
    return chosen


def mildest(plan: Plan) -> Plan:
    """The plan that prunes and loses least: the one option of the least estimated loss, or others that lose no more."""
    alone: list[float] = []
    together: dict[Hashable, float] = {}
    for group in groups_of(plan):
        least: dict[Hashable, float] = {}
        for option in group.options:
            if (bond := group.bond(option)) is not None:
                least[bond] = min(option.loss, least.get(bond, option.loss))
            elif option.prune or option.skip:
                alone.append(option.loss)
        for shared, loss in least.items():
            together[shared] = together.get(shared, 0.0) + loss
    return select(plan, Budget("max_quality_loss", min([*alone, *together.values()]) * (1 + 1e-9)))


def _chosen(groups: Iterable[Group], picked: Iterable[int]) -> dict[str, Option]:
    return {group.name: group.options[at] for group, at in zip(groups, picked, strict=True)}


def depthwise_gain(plan: Plan) -> float:
    """Microseconds that the depthwise convolutions of a plan take less beside sparse convolutions.

    They run channels first there (see `targets.base.DEPTHWISE`). In all they take no more of the model than what is
    spent outside of the sites that can be pruned.
    """
    assert plan.summary is not None
    pairs = [pair for site in plan if (pair := _depthwise(site)) is not None]
    dense = sum(kept.cost for kept, _ in pairs)
    share = min(1.0, plan.summary.rest_us / dense) if dense else 0.0
    return share * sum(kept.cost - beside.cost for kept, beside in pairs)


def _depthwise(site: SiteChoice) -> tuple[Prediction, Prediction] | None:
    """What a depthwise convolution is by itself, and beside sparse convolutions; None for other sites."""
    dense, channels_first = site.prediction(DENSE), site.prediction(DEPTHWISE)
    if site.options or dense is None or channels_first is None:
        return None
    return dense, channels_first if channels_first.cost * MARGIN <= dense.cost else dense


def _channels_first(plan: Plan, chosen: Mapping[str, Option]) -> bool:
    """Whether a convolution of the plan runs a sparse kernel."""
    return any(
        not chosen[module_name(site)].candidate.is_dense for site in plan if site.options and site.window is not None
    )


def _items(groups: Iterable[Group], *, limit_loss: bool) -> list[list[Item]]:
    return [
        [Item(*((o.us, o.loss) if limit_loss else (o.loss, o.us)), bond=group.bond(o)) for o in group.options]
        for group in groups
    ]


def fastest(plan: Plan) -> Plan:
    """The plan of the lowest latency, whatever it loses."""
    groups = groups_of(plan)
    most = sum(max(option.loss for option in group.options) for group in groups)
    picked = solve(_items(groups, limit_loss=True), most)
    assert picked is not None
    return with_choice(plan, plan.budget, _chosen(groups, picked))


def least_us(plan: Plan) -> float:
    """Predicted microseconds of one call of the model with the fastest option everywhere."""
    summary = fastest(plan).summary
    assert summary is not None
    return summary.planned_us


def _unreachable(plan: Plan, budget: Budget) -> str:
    summary = fastest(plan).summary
    assert summary is not None
    best = summary.planned_us
    return (
        f"a {budget} cannot be reached: with the fastest option everywhere the model is predicted to take "
        f"{milliseconds(best)} ({summary.dense_us / best:.2f} times as fast as the dense model's "
        f"{milliseconds(summary.dense_us)}) at an estimated loss of {summary.estimated_loss:.3g}; "
        f"{milliseconds(summary.rest_us)} are spent outside of the layers that can be pruned"
    )


def with_choice(plan: Plan, budget: Budget | None, chosen: dict[str, Option]) -> Plan:
    """A copy of a plan whose sites take the options of these patterns, by name of the module."""
    summary = plan.summary
    assert summary is not None
    sites = []
    total = summary.rest_us
    channels_first = _channels_first(plan, chosen)
    if channels_first:
        total -= depthwise_gain(plan)
    for site in plan:
        if site.options:
            wanted = chosen[module_name(site)]
            option = next(o for o in site.options if (o.prune, o.skip) == (wanted.prune, wanted.skip))
            total += option.us
            reason = _reason(site, option)
            site = replace(site, prune=option.prune, skip=option.skip, chosen=option.candidate, reason=reason)
        elif (pair := _depthwise(site)) is not None:
            kept = pair[channels_first].candidate
            site = replace(site, chosen=kept, reason=f"{kept}: it is a depthwise convolution, which is not pruned")
        sites.append(site)
    loss = sum(option.loss for option in chosen.values())
    summary = replace(summary, planned_us=summary.call_us(total), estimated_loss=loss, measured_loss=None)
    return replace(plan, budget=budget, summary=summary, sites=sites)


def _reason(site: SiteChoice, option: Option) -> str:
    kept = site.options[0]
    if option == kept:
        return f"{option.candidate}: left as it is, {option.us:.0f} us"
    done = [f"pruned to {option.prune}"] if option.prune else []
    done += [f"skips {option.skip}"] if option.skip else []
    return (
        f"{option.candidate}: {' and '.join(done)}, {option.us:.0f} us instead of {kept.us:.0f} us "
        f"for an estimated loss of {option.loss:.3g}"
    )
