"""Recipes: what is read, what is refused and in which words, and what the hashes cover."""

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from tightbeam.common.errors import RecipeError
from tightbeam.common.settings.messages import did_you_mean, known_keys
from tightbeam.common.settings.yaml_text import key_lines, parse_mapping, parse_value
from tightbeam.common.wire.codecs import CODECS
from tightbeam.edge.recipe import (
    AdapterSection,
    CodecName,
    Codecs,
    DataSection,
    ModelSection,
    OutputSection,
    Recipe,
    TrainSection,
    load_recipe,
    recipe_from_mapping,
)

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TEXT = """\
# tightbeam train a.yaml
model:
  cloud: localhost:50051
cut: 4:4
data:
  train: a.jsonl
train:
  epochs: 3
  lr: 1e-4
output: {name: first}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_short_recipe_is_completed_with_defaults(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.cut == "4:4"  # YAML 1.1 would read 244
    assert recipe.train.lr == 1e-4  # YAML 1.1 would read text
    assert recipe.codec == Codecs()
    assert recipe.adapter.method == "lora"
    assert recipe.run_folder == Path("runs/first")


def test_overrides_win_and_follow_the_same_rules(file: Path) -> None:
    recipe = load_recipe(
        file,
        [
            "train.lr=3e-5",
            "cut=2:6",
            "codec=int8",
            "adapter.target_modules=[q_proj, v_proj]",
            "adapter.extra.use_dora=true",
        ],
    )
    assert (recipe.train.lr, recipe.cut) == (3e-5, "2:6")
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
    assert recipe.adapter.extra == {"use_dora": True}
    steps = load_recipe(file, ["train.epochs=null", "train.steps=7"])
    assert (steps.train.epochs, steps.train.steps) == (None, 7)
    assert load_recipe(file, ["data.train=x=y.jsonl"]).data.train == Path("x=y.jsonl")


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        ("int8", ("int8", "int8", "int8", "int8")),
        ({"activations": "int8", "gradients": "bf16"}, ("int8", "int8", "bf16", "bf16")),
        ({"activations": "int8", "activations_down": "bf16"}, ("int8", "bf16", None, None)),
        ({"gradients_up": "bf16"}, (None, None, "bf16", None)),
        ("int4/int8s", ("int4", "int4", "int8s", "int8s")),
    ],
)
def test_codecs_are_named_for_all_for_kinds_or_one_by_one(
    codec: Any, expected: tuple[str | None, ...]
) -> None:
    read = Codecs.model_validate(codec)
    default = Codecs().activations_up
    found = (read.activations_up, read.activations_down, read.gradients_up, read.gradients_down)
    assert found == tuple(name or default for name in expected)


def test_the_recipe_knows_every_codec() -> None:
    assert get_args(CodecName) == ("auto", *CODECS)


def test_a_frozen_bottom_needs_a_top_to_train(file: Path) -> None:
    for settings in (["mode=top"], ["train.freeze_bottom_after=1"]):
        with pytest.raises(RecipeError, match="leaves the top blocks to train, and cut 4:0 has none"):
            load_recipe(file, ["cut=4:0", *settings])
    assert load_recipe(file, ["cut=4:0"]).cut == "4:0"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=3", "--set train.lrr=3: unknown key train.lrr. Did you mean train.lr?"),
        ("lr=3", "unknown key lr. Did you mean train.lr?"),
        ("trian.lr=1", "--set trian.lr=1: unknown key trian. Did you mean train?"),
        ("codec.activtions=int8", "unknown key codec.activtions. Did you mean codec.activations_"),
        ("xyzzy=3", "unknown key xyzzy. Known here: adapter, cache, codec, cut,"),
        ("train.lr=fast", "--set train.lr=fast: train.lr should be a number, not 'fast'."),
        ("train.lr='1e-4'", "train.lr should be a number, not '1e-4'"),
        ("train.lr=0", "train.lr should be greater than 0, not 0."),
        ("train.batch_size=2.5", "train.batch_size should be a whole number, not 2.5"),
        ("train.batch_size=true", "train.batch_size should be a whole number, not True"),
        ("train.batch_size=0", "train.batch_size should be at least 1, not 0"),
        ("adapter.dropout=1", "adapter.dropout should be less than 1, not 1"),
        ("model.insecure=yes", "model.insecure should be true or false, not 'yes'"),
        ("model.cloud=localhost", "model.cloud is refused: 'localhost' is not host:port: it ends without"),
        ("model.cloud=http://a:1", "'http://a:1' is not host:port: it is the address of a page"),
        ("model.cloud=a:99999", "'a:99999' is not host:port: ports go to 65535"),
        (
            "model.fingerprint=deadbeef",
            "should be 64 hexadecimal digits, as `tightbeam doctor` shows",
        ),
        ("model.dtype=fp32", "model.dtype should be 'auto', 'float32', 'bfloat16' or 'float16', not 'fp32'"),
        ("cut=4", "cut should be k:m, for example 4:4, not 4"),
        ("cut=0:0", "cut is refused: 0:0 leaves no block at the edge, so there is nothing to train"),
        ("cut=4-4", "cut should be k:m, for example 4:4, not '4-4'"),
        ("mode=up", "mode should be 'ushape', 'top' or 'side', not 'up'"),
        ("train.freeze_bottom_after=soon", "should be a number of epochs, `N steps`, or auto"),
        ("train.freeze_bottom_after=0", "should be more than 0 epochs"),
        ("train.max_mb=0", "train.max_mb should be greater than 0, not 0."),
        ("codec=3", "codec is refused: should be one codec name"),
        ("codec=delta-int4", "codec.activations_up should be 'auto', 'fp32', 'bf16', 'int8', 'int5',"),
        ("codec=int8/int4/int8", "codec.gradients_up should be 'auto', 'fp32',"),
        ("codec=INT8", "'int5s' or 'int4s', not 'INT8'"),
        ("adapter.target_modules=all", "adapter.target_modules should be 'all-linear' or a list, not 'all'"),
        ("adapter.extra=3", "adapter.extra should be keys and values, not 3"),
        ("train=3", "train should be keys and values, not 3"),
        ("data=null", "data should be keys and values, not None"),
        ("data.train=3", "data.train should be text, not 3"),
        ("output.name=a/b", "output.name should be letters, digits, dot, dash and underscore, not 'a/b'"),
        ("train.steps=3", "train is refused: give exactly one of epochs and steps"),
        ("train.epochs=null", "train is refused: give exactly one of epochs and steps"),
        ("train", "--set train is not of the form key=value"),
        ("=3", "--set =3 is not of the form key=value"),
        ("cut.k=3", "cut holds the plain value '4:4', so it has no key k"),
        ("train.lr=[1", "--set train.lr=[1:1 is not valid YAML"),
    ],
)
def test_mistakes_are_told_in_plain_words(file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, [override])
    assert message in str(caught.value)
    assert caught.value.cure


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: 1e-4", "learning_rate: 1e-4", "a.yaml:9: unknown key train.learning_rate"),
        ("lr: 1e-4", "lr: much", "a.yaml:9: train.lr should be a number, not 'much'."),
        ("  train: a.jsonl", "  eval: a.jsonl", "a.yaml:5: data.train is missing."),
        ("cut: 4:4\n", "", "cut is missing."),
        ("  cloud: ", "  cloud : - ", "a.yaml:3 is not valid YAML"),
        ("  lr: 1e-4", "  lr: 1e-4\n  lr: 1e-5", "a.yaml:10 is not valid YAML: the key lr is given twice"),
        ("epochs: 3", "epochs: .inf", "train.epochs should be a number, not '.inf'"),
        ("  train: a.jsonl", "  train: a.jsonl\n  eval: b.jsonl\n  eval_fraction: 0.1", "exclude each other"),
    ],
)
def test_mistakes_in_the_file_name_its_line(file: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    file.write_text(TEXT.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert message in str(caught.value)


def test_every_mistake_is_told_at_once(file: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["train.lr=fast", "cut=4", "xyzzy=1"])
    assert [line.split(":")[0] for line in caught.value.message.splitlines()] == [
        "--set cut=4", "--set train.lr=fast", "--set xyzzy=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty, not keys and values"),
        ("- a\n", "holds list at its top level"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
    with pytest.raises(
        RecipeError, match=r"Cannot read the recipe .*none\.yaml: No such file or directory\. G"
    ):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4:4", "4:4"), ("1e-4", 1e-4), ("1.", 1.0), (".5", 0.5), ("-3", -3), ("010", 10), ("no", "no"),
        ("on", "on"),
        ("true", True), ("null", None), ("~", None), ("", None), ("2026-01-01", "2026-01-01"),
        ("1_000", "1_000"),
        ("10.0.0.1:50051", "10.0.0.1:50051"), ("0x10", "0x10"), (".inf", ".inf"), ("'3'", "3"),
        ("[1, a]", [1, "a"]),
    ],
)  # fmt: skip
def test_yaml_means_what_it_looks_like(text: str, value: object) -> None:
    read = parse_value(text, "here")
    assert read == value
    assert type(read) is type(value)


def test_lines_of_keys() -> None:
    assert key_lines(TEXT)["train.lr"] == 9
    assert key_lines(TEXT)["output.name"] == 10
    assert parse_mapping(TEXT, "a.yaml")["cut"] == "4:4"


def test_the_resolved_recipe_reads_back_equal(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["codec={activations: int8}", "adapter.extra.use_dora=true", "train.lr=1e-5"])
    again = tmp_path / "again.yaml"
    again.write_text(recipe.resolved_yaml(), encoding="utf-8")
    assert load_recipe(again) == recipe
    assert load_recipe(again).sha256() == recipe.sha256()


def test_a_recipe_is_frozen(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(load_recipe(file).train, "lr", 3)  # noqa: B010  # the point of the test


@pytest.mark.parametrize(
    ("override", "same_numbers"),
    [
        ("model.cloud=other:1", True),
        ("model.identity=certs/x", True),
        ("train.checkpoint_every=7", True),
        ("train.keep_checkpoints=7", True),
        ("train.eval_every=7", True),
        ("output.name=second", True),
        ("train.lr=1e-5", False),
        ("train.seed=3", False),
        ("codec=int8", False),
        ("data.max_length=77", False),
        ("cut=3:4", False),
    ],
)
def test_hashes_tell_what_may_change_in_a_resumed_run(file: Path, override: str, same_numbers: bool) -> None:
    before, after = load_recipe(file), load_recipe(file, [override])
    assert before.sha256() != after.sha256()
    assert (before.numbers_sha256() == after.numbers_sha256()) is same_numbers


@pytest.mark.parametrize(
    "section", [Recipe, ModelSection, Codecs, AdapterSection, DataSection, TrainSection, OutputSection]
)
def test_every_field_is_documented(section: type[BaseModel]) -> None:
    for name, field in section.model_fields.items():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            assert field.description, f"{section.__name__}.{name}"
    assert section.model_json_schema()["additionalProperties"] is False


def test_the_documentation_lists_every_key() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    missing = [key for key in known_keys(Recipe) if f"`{key}`" not in page]
    assert not missing


def test_did_you_mean_keeps_quiet_when_nothing_is_near() -> None:
    assert did_you_mean("lorra", ["lora", "ia3"]) == " Did you mean lora?"
    assert did_you_mean("zzz", ["lora", "ia3"]) == ""


def test_a_mapping_is_copied_not_changed() -> None:
    mapping = parse_mapping(TEXT, "a")
    recipe_from_mapping(mapping, overrides=["train.lr=5"])
    assert mapping == parse_mapping(TEXT, "a")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid_and_says_how_to_run_it(path: Path) -> None:
    load_recipe(path)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("#")
    assert f"tightbeam train recipes/{path.name}" in first or "docker-compose.yml" in first


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 4
