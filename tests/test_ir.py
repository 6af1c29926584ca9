from __future__ import annotations

import pytest
import torch

from sparsecomp.ir import IRError, LinearSite, Operation, SparseGraph

WEIGHT = torch.ones(6, 4)


def small() -> SparseGraph:
    """relu(x @ W.T) + x2 with x [3, 4] and W [6, 4]."""
    graph = SparseGraph()
    graph.add(Operation("x", "input", shape=(3, 4), dtype=torch.float32))
    graph.add(Operation("w", "constant", attrs={"value": WEIGHT, "index": 1}, shape=(6, 4), dtype=torch.float32))
    graph.add(Operation("r", "input", shape=(3, 6), dtype=torch.float32))
    graph.add(Operation("y", "linear", ("x", "w"), shape=(3, 6), dtype=torch.float32, module="fc"))
    graph.add(Operation("a", "relu", ("y",), shape=(3, 6), dtype=torch.float32))
    graph.add(Operation("s", "add", ("a", "r"), shape=(3, 6), dtype=torch.float32))
    graph.add(Operation("output", "output", ("s",)))
    return graph


def site(**changes: object) -> LinearSite:
    fields: dict[str, object] = {
        "name": "fc",
        "weight": WEIGHT,
        "weight_op": "w",
        "weight_index": 1,
        "transposed": False,
        "x": "x",
        "residual": "r",
        "activation": "relu",
        "operations": ("y", "a", "s"),
        "tokens": 3,
        "dynamic": False,
        "dtype": torch.float32,
    }
    return LinearSite(**(fields | changes))  # type: ignore[arg-type]


def test_order_users_and_text() -> None:
    graph = small()
    assert [operation.name for operation in graph] == ["x", "w", "r", "y", "a", "s", "output"]
    assert [user.name for user in graph.users("y")] == ["a"]
    assert len(graph) == 7
    assert "y" in graph
    assert "nothing" not in graph
    graph.sites.append(site())
    graph.verify()
    assert "y = linear(x, w) float32[3, 6]  # fc" in str(graph)
    assert "fc: 4 -> 6, 3 tokens (x=x, weight=w, residual=r, activation=relu) replaces y, a, s" in str(graph)


def test_users_are_in_order_and_listed_once() -> None:
    graph = small()
    graph.add(Operation("twice", "add", ("y", "y"), shape=(3, 6)))
    assert [user.name for user in graph.users("y")] == ["a", "twice"]


def test_add_rejects_a_second_name_and_an_unknown_input() -> None:
    graph = small()
    with pytest.raises(IRError, match="two operations are called 'y'"):
        graph.add(Operation("y", "relu", ("x",)))
    with pytest.raises(IRError, match="reads 'later'"):
        graph.add(Operation("z", "relu", ("later",)))
    with pytest.raises(IRError, match="no operation 'later'"):
        graph.operation("later")


def test_roots_follow_what_may_share_memory() -> None:
    graph = small()
    graph.add(Operation("view", "reshape", ("s",), aliases=True))
    graph.add(Operation("flat", "reshape", ("view",), aliases=True))
    assert graph.roots("flat") == {"flat", "view", "s"}
    assert graph.roots("s") == {"s"}


def test_writers_between() -> None:
    graph = small()
    graph.add(Operation("w1", "relu", ("s",), mutates=("s",), aliases=True))
    graph.add(Operation("w2", "relu", ("a",), mutates=("a",), aliases=True))
    assert [writer.name for writer in graph.writers()] == ["w1", "w2"]
    assert [writer.name for writer in graph.writers(after="w1")] == ["w2"]
    assert [writer.name for writer in graph.writers(after="y", before="w2")] == ["w1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operations": ()}, "absorbs no operation"),
        ({"activation": "elu"}, "'elu' is none of"),
        ({"operations": ("a", "y", "s")}, "not in graph order"),
        ({"weight_op": "x"}, "of kind input, expected constant"),
        ({"weight": torch.ones(6)}, "expected a matrix"),
        ({"x": "r"}, r"expected \[..., 4\]"),
        ({"transposed": True}, r"expected \[..., 6\]"),
        ({"tokens": 5}, "tokens is 5"),
        ({"bias": "r"}, r"bias has shape \(3, 6\)"),
        ({"residual": "x"}, r"residual has shape \(3, 4\)"),
        ({"residual": "a"}, "absorbed at once"),
        ({"residual": "output"}, "residual has shape"),
        ({"operations": ("y", "s")}, "y is absorbed but used by a"),
    ],
)
def test_verify_says_what_is_wrong_with_a_site(changes: dict[str, object], message: str) -> None:
    graph = small()
    graph.sites.append(site(**changes))
    with pytest.raises(IRError, match=message):
        graph.verify()


def test_verify_checks_sites_against_each_other() -> None:
    graph = small()
    graph.sites += [site(), site()]
    with pytest.raises(IRError, match="two sites are called 'fc'"):
        graph.verify()
    graph.sites[1].name = "fc#2"
    with pytest.raises(IRError, match="absorbed by two sites"):
        graph.verify()
    graph.sites[1].declined = "a reason"
    graph.verify()


def test_dynamic_sizes_compare_as_expressions() -> None:
    graph = SparseGraph()
    for name, sizes in (("x", ("s0", 4)), ("r", ("s1", 6))):
        graph.add(Operation(name, "input", shape=(3, int(sizes[1])), sizes=sizes, dynamic=True, dtype=torch.float32))
    graph.add(Operation("w", "constant", shape=(6, 4), dtype=torch.float32))
    graph.add(Operation("y", "linear", ("x", "w"), shape=(3, 6), sizes=("s0", 6), dynamic=True))
    graph.sites.append(site(operations=("y",), dynamic=True, activation="none"))
    with pytest.raises(IRError, match="residual has shape"):
        graph.verify()


def test_features_of_a_declined_weight_that_is_no_matrix() -> None:
    declined = site(weight=torch.ones(2, 3, 4), declined="a reason")
    assert (declined.in_features, declined.out_features) == (0, 0)
    assert site(weight=WEIGHT.t(), transposed=True).out_features == 6
