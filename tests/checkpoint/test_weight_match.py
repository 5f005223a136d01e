"""Which tensors of a source a model takes, and how the differences are listed."""

from train.checkpoint.weight_match import Entry, compare


def entries(**shapes):
    return {name.replace("__", "."): Entry(shape, "float32") for name, shape in shapes.items()}


def test_equal_names_and_shapes_are_complete():
    model = entries(a__weight=(2, 3), a__bias=(2,))
    match = compare(model, {}, model)
    assert match.is_complete
    assert match.used == {"a.weight": "a.weight", "a.bias": "a.bias"}
    assert match.lines(9) == []


def test_each_kind_of_difference_has_its_line():
    model = entries(a=(2,), head=(5, 2), extra=(1,))
    source = entries(a=(2,), head=(9, 2), old=(1,), older=(1,), oldest=(1,))
    match = compare(model, {}, source)
    assert match.used == {"a": "a"}
    assert not match.is_complete
    assert match.lines(2) == [
        "  missing in the source (1): extra",
        "  unexpected in the source (3): old, older and 1 more",
        "  other shape or dtype (1): head (shape (9, 2) in the source, (5, 2) in the model)",
    ]


def test_floats_are_converted_and_quantised_weights_are_not():
    model = {name: Entry((2,), "float32") for name in "abcd"} | {"n": Entry((), "int64")}
    source = {
        "a": Entry((2,), "bfloat16"), "b": Entry((2,), "float64"), "c": Entry((2,), "int8"),
        "d": Entry((2,), "F8_E4M3"), "n": Entry((), "int64"),
    }  # fmt: skip
    match = compare(model, {}, source)
    assert sorted(match.used) == ["a", "b", "n"]
    assert match.other == [
        "c (int8 in the source, float32 in the model)",
        "d (F8_E4M3 in the source, float32 in the model)",
    ]


def test_a_tied_tensor_is_found_under_any_of_its_names():
    model, names = entries(embed=(9, 2)), {"embed": ["embed", "head"]}
    assert compare(model, names, entries(head=(9, 2))).used == {"embed": "head"}
    both = compare(model, names, entries(head=(9, 2), embed=(9, 2)))
    assert both.is_complete
    assert (both.used, both.tied) == ({"embed": "embed"}, [("embed", "embed", "head")])


def test_a_common_prefix_is_suggested_and_not_assumed():
    model = entries(a__weight=(2, 3), b=(2,), c=(1,))
    source = {f"_orig_mod.{name}": entry for name, entry in model.items()}
    match = compare(model, {}, {**source, "_orig_mod.c": Entry((7,), "float32")})
    assert match.used == {}
    assert match.hint.startswith("2 more would match without the prefix '_orig_mod.' in the names")
    added = compare(source, {}, model)
    assert added.hint.startswith("3 more would match with the prefix '_orig_mod.' before the names")
    assert added.lines(1)[-1] == f"  {added.hint}"


def test_without_a_common_prefix_nothing_is_suggested():
    assert compare(entries(a=(1,)), {}, entries(b=(1,), x__b=(1,))).hint == ""
    assert compare(entries(a=(1,)), {}, entries(x__a=(2,))).hint == ""
