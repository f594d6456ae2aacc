"""Recipes: what is accepted, what is refused and how it is said, and what settings resolve to."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.merge.recipe import parse_recipe, read_recipe
from stiefel.merge.recipe_errors import RecipeError, nearest
from stiefel.merge.recipe_methods import METHODS, NOT_OFFERED
from stiefel.merge.recipe_settings import Rule
from stiefel.merge.recipe_yaml import MAX_BYTES

GOOD = """models:
  - model: ./ft_math
    parameters: {weight: 0.5, density: 0.2}
  - model: ./ft_code
    parameters: {weight: [0.2, 0.8], density: 0.2}
merge_method: ties
base_model: ./base
parameters: {normalize: true, lambda: 1.0}
dtype: bfloat16
"""


def problems(text):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    return caught.value.problems


def only(text):
    (problem,) = problems(text)
    return problem


def test_the_schema_of_mergekit_is_read():
    recipe = parse_recipe(GOOD)
    assert recipe.method is METHODS["ties"]
    assert (str(recipe.base), recipe.dtype, recipe.stacked) == ("./base", "bfloat16", False)
    (one,) = recipe.slices
    assert [str(source.ref) for source in one.sources] == ["./ft_math", "./ft_code"]
    assert one.sources[1].parameters["weight"] == (Rule((0.2, 0.8)),)
    assert recipe.parameters == {"normalize": (Rule(True),), "lambda": (Rule(1.0),)}
    assert recipe.text == GOOD
    assert recipe.warnings == ()


# Recipes as mergekit's own examples are built, one for every method and every form of a setting.
MERGEKIT = {
    "linear": """
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.3}}
merge_method: linear
dtype: float16
""",
    "slerp": """
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [0, 2]}
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
""",
    "task_arithmetic": """
models:
  - model: base
  - {model: a, parameters: {weight: 0.35}}
  - {model: b, parameters: {weight: -1e-1}}
merge_method: task_arithmetic
base_model: base
parameters: {normalize: false}
""",
    "ties": """
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "dare_ties": """
models:
  - model: base
  - {model: a, parameters: {density: 0.53, weight: 0.4}}
merge_method: dare_ties
base_model: base
parameters: {int8_mask: true}
tokenizer_source: union
""",
    "dare_linear": """
models:
  - {model: a+lora, parameters: {density: 0.53, weight: 0.4}}
merge_method: dare_linear
base_model: {model: {path: base}, lora: null}
tokenizer: {source: base}
chat_template: auto
out_dtype: bfloat16
""",
    "passthrough": """
slices:
  - sources: [{model: a, layer_range: [0, 24]}]
  - sources:
      - model: b
        layer_range: [8, 32]
        parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}
merge_method: passthrough
""",
}


@pytest.mark.parametrize("name", MERGEKIT)
def test_recipes_of_mergekit_are_accepted(name):
    recipe = parse_recipe(MERGEKIT[name])
    assert recipe.method.name == name
    assert recipe.warnings == ()


def test_types_may_be_written_as_torch_does():
    assert parse_recipe(GOOD.replace("dtype: b", "dtype: torch.b")).dtype == "bfloat16"


def test_forms_of_one_thing_are_read_alike():
    text = MERGEKIT["dare_linear"]
    assert str(parse_recipe(text).base) == "base"
    source = parse_recipe(text).slices[0].sources[0]
    assert (source.ref.model, source.ref.adapter) == ("a", "lora")
    written_out = text.replace("a+lora", "{model: a, lora: {path: lora}}")
    assert parse_recipe(written_out).slices == parse_recipe(text).slices
    recipe = parse_recipe(GOOD.replace("./base", "owner/base@v1"))
    assert (recipe.base.model, recipe.base.revision) == ("owner/base", "v1")
    assert parse_recipe(MERGEKIT["dare_ties"]).union
    assert parse_recipe(GOOD + "tokenizer_source: ./ft_math\n").tokenizer.model == "./ft_math"
    assert parse_recipe(GOOD.replace("ties", "dare")).method.name == "dare_linear"


def test_adapters_become_an_adapter_or_go_onto_the_base():
    alone = "models:\n - adapter: x\n - adapter: y\nmerge_method: orthomerge_oft\n"
    assert parse_recipe(alone).merges_adapters
    onto = GOOD.replace("model: ./ft_math", "adapter: ./lora")
    assert parse_recipe(onto).slices[0].sources[0].is_adapter
    assert not parse_recipe(onto).merges_adapters
    low_rank = "models:\n - {adapter: x, parameters: {weight: 1}}\nmerge_method: linear\n"
    assert parse_recipe(low_rank).merges_adapters
    assert "does not merge adapters alone" in only(low_rank.replace("linear", "dare_ties")).message
    mixed = low_rank.replace("\nmerge", "\n - {model: z, parameters: {weight: 1}}\nmerge")
    assert "needs base_model" in only(mixed).message
    wrong = "models:\n - model: x\nmerge_method: orthomerge_oft\n"
    assert "write adapter: PATH" in only(wrong).message


@pytest.mark.parametrize(
    ("change", "line", "key", "said"),
    [
        (("models:", "model:"), 1, "model", "did you mean 'models'?"),
        (("density: 0.2}\nmerge", "densty: 0.2}\nmerge"), 5, "models[1].parameters.densty",
         "did you mean 'density'?"),
        (("weight: 0.5", "weight: heavy"), 3, "models[0].parameters.weight",
         "must be a finite number, got 'heavy'"),
        (("weight: 0.5", "weight: .nan"), 3, "models[0].parameters.weight", "got nan"),
        (("weight: 0.5", "weight: true"), 3, "models[0].parameters.weight", "got True"),
        (("density: 0.2", "density: 1.2"), 3, "models[0].parameters.density",
         "must be a number at least 0 and at most 1, got 1.2"),
        (("[0.2, 0.8]", "[]"), 5, "models[1].parameters.weight", "an empty list"),
        (("[0.2, 0.8]", "[0.2, {value: 1}]"), 5, "models[1].parameters.weight", "mixes"),
        (("[0.2, 0.8]", "[{valu: 1}]"), 5, "models[1].parameters.weight", "did you mean 'value'?"),
        (("[0.2, 0.8]", "{filter: mlp}"), 5, "models[1].parameters.weight", "needs a value"),
        (("[0.2, 0.8]", "{value: 1, filter: 3}"), 5, "models[1].parameters.weight", "got 3"),
        (("method: ties", "method: tise"), 6, "merge_method", "did you mean 'ties'?"),
        (("method: ties", "method: 7"), 6, "merge_method", "got 7"),
        (("base_model: ./base\n", ""), 2, "models", "ties needs base_model"),
        (("normalize: true", "normalize: 1"), 8, "parameters.normalize",
         "must be true or false, got 1"),
        (("normalize: true", "rescale: true"), 8, "parameters.rescale", "only false is offered"),
        (("bfloat16", "bf16"), 9, "dtype", "did you mean 'bfloat16'?"),
        (("./base", "a+b+c"), 7, "base_model", "at most one +adapter"),
        (("./base", "+b"), 7, "base_model", "must be path or path+adapter"),
        (("./base", "[a]"), 7, "base_model", "got ['a']"),
        (("./base", "{modell: a, model: a}"), 7, "base_model.modell", "did you mean 'model'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_line_key_and_way_out(change, line, key, said):
    assert GOOD.count(change[0]) >= 1
    problem = only(GOOD.replace(*change, 1))
    assert (problem.line, problem.key) == (line, key)
    assert said in problem.message


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("modules: {}\n", "not supported"),
        ("slices: []\n", "should have at least 1 item"),
        ("allow_missing: bse\n", "must be error | base, got 'bse'; did you mean 'base'?"),
        ("seed: -1\n", "got -1"),
        ("seed: true\n", "got True"),
        ("tokenizer: {tokens: {}}\n", "not supported"),
        ("tokenizer: {source: base}\ntokenizer_source: base\n", "keep one of them"),
        ("chat_template: chatml\n", "templates by name"),
        ("slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n", "models or slices"),
    ],
)
def test_further_keys_are_checked(more, said):
    assert said in str(RecipeError("", problems(GOOD + more)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("[0, 2]", "[2, 0]"),
        ("[0, 2]", "[0, 1.5]"),
        ("[0, 2]", "[0]"),
        ("[0, 2]", "[-1, 2]"),
    ],
)
def test_ranges_of_layers_are_checked(change, said):
    text = MERGEKIT["slerp"].replace(change, said, 1)
    assert any("layer_range" in problem.key for problem in problems(text))


def test_sources_of_a_slice_are_equally_long():
    problem = only(MERGEKIT["slerp"].replace("[0, 2]", "[0, 3]", 1))
    assert "equally many layers, got [2, 3]" in problem.message


def test_the_number_of_models_fits_the_method():
    third = MERGEKIT["slerp"].replace(
        "merge_method", "      - {model: c, layer_range: [0, 2]}\nmerge_method"
    )
    assert "slerp takes 2 models, got 3" in only(third).message
    alone = "models: [{model: base}]\nbase_model: base\nmerge_method: task_arithmetic\n"
    assert "takes at least 1 models besides the base, got 0" in only(alone).message
    two = "models: [{model: a}, {model: b}]\nmerge_method: passthrough\n"
    assert "passthrough takes 1 models, got 2" in only(two).message


def test_all_problems_come_at_once():
    text = GOOD.replace("weight: 0.5", "weight: x").replace("lambda: 1.0", "lambada: 1")
    assert [problem.line for problem in problems(text)] == [3, 8]
    # Wrong keys and wrong parameters, too; sources of slices as well as models.
    text = text.replace("base_model:", "base_modle:").replace(
        "  - model: ./ft_code", "  - model: 3"
    )
    assert [problem.line for problem in problems(text)] == [3, 4, 7, 8]
    text = """slices:
  - sources: [{model: a, layer_range: [0, 2], parameters: {weight: x}}]
    parameters: {lambda: y}
  - sources: 3
  - 4
merge_method: ties
base_model: [b]
"""
    found = {p.key: p.message for p in problems(text)}
    assert {"slices[0].sources[0].parameters.weight", "slices[0].parameters.lambda"} <= set(found)
    assert found["base_model"] == (
        "must be path, path+adapter or {model: path, lora: path}, got ['b']"
    )


def test_stand_ins_need_a_method_that_reads_the_base():
    text = GOOD + "allow_nonfinite: base\n"
    assert parse_recipe(text).policies.nonfinite == "base"
    linear = "models: [{model: a}]\nmerge_method: linear\nparameters: {weight: 1}\n"
    found = only(linear + "allow_nonfinite: base\n")
    assert (found.line, found.key) == (4, "allow_nonfinite")
    assert "linear does not read the base" in found.message


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_methods_that_are_not_here_are_told_from_misspelt_ones(name):
    problem = only(GOOD.replace("method: ties", f"method: {name}"))
    assert "is not offered" in problem.message


def test_parameters_without_effect_are_named():
    recipe = parse_recipe(MERGEKIT["linear"] + "parameters: {density: 0.5}\n")
    (warning,) = recipe.warnings
    assert "line 7: parameters.density has no effect" in warning
    assert "density" not in recipe.parameters
    recipe = parse_recipe(GOOD.replace("weight: 0.5,", "weight: 0.5, lambda: 2,"))
    assert "is of the whole merge, not of one model" in recipe.warnings[0]
    assert "lambda" not in recipe.slices[0].sources[0].parameters


def test_files(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        read_recipe(path)
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(RecipeError, match="no UTF-8"):
        read_recipe(path)
    path.write_text("é" * MAX_BYTES)
    with pytest.raises(RecipeError, match="at most"):
        read_recipe(path)
    path.write_text(GOOD)
    assert read_recipe(path).name == str(path)


def test_nearest_names():
    assert nearest("lamda", ["lambda", "weight"]) == "; did you mean 'lambda'?"
    assert nearest("Base-Model", ["base_model"]) == "; did you mean 'base_model'?"
    assert nearest("qqq", ["lambda"]) == ""


PLACES = (
    ("models",), ("models", 0), ("models", 0, "model"), ("models", 0, "parameters"),
    ("models", 1, "parameters", "weight"), ("models", 1, "parameters", "density"),
    ("merge_method",), ("base_model",), ("parameters",), ("parameters", "lambda"), ("dtype",),
    ("slices",), ("tokenizer",), ("tokenizer_source",), ("chat_template",), ("seed",),
)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(), st.text(max_size=5)
)
KEYS = st.sampled_from(["model", "lora", "path", "value", "filter", "sources", "layer_range", "x"])
VALUES = st.recursive(
    LEAVES,
    lambda t: st.one_of(st.lists(t, max_size=3), st.dictionaries(KEYS, t, max_size=3)),
    max_leaves=6,
)


@settings(deadline=None, max_examples=120)
@given(st.sampled_from(PLACES), VALUES)
def test_whatever_stands_in_a_place_is_read_or_refused_with_words(place, value):
    content = yaml.safe_load(GOOD)
    node = content
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = value
    text = yaml.safe_dump(content)
    try:
        recipe = parse_recipe(text)
    except RecipeError as error:
        assert all(problem.message for problem in error.problems)  # noqa: PT017
    else:
        assert recipe.slices
