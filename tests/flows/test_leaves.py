"""What nested mappings hold, by path."""

from flows.leaves import leaves

NESTED = {"a": {"b": {"c": 1}, "empty": {}}, "d": [{"e": None}, [2]]}


def test_nested_values_get_dotted_names_and_lists_are_values() -> None:
    assert list(leaves(NESTED)) == [("a.b.c", 1), ("d", [{"e": None}, [2]])]
    assert list(leaves({"a": 1}, name="of")) == [("of.a", 1)]
    assert list(leaves(3, name="of")) == [("of", 3)]


def test_lists_are_gone_into_where_their_items_have_names() -> None:
    assert list(leaves(NESTED, "[{}]")) == [("a.b.c", 1), ("d[0].e", None), ("d[1][0]", 2)]
    assert list(leaves(NESTED, ".{}")) == [("a.b.c", 1), ("d.0.e", None), ("d.1.0", 2)]
    assert list(leaves([1], ".{}")) == [("0", 1)]
