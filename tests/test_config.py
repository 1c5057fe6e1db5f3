"""Shipped configs say what their headers say, and a wrong option ends in one line that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bimos import BimosError
from bimos.config import RunConfig, override, read_yaml
from bimos.methods import method_config

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_parse(path: Path) -> None:
    config = RunConfig.from_yaml(path)
    assert method_config(config.method, config.options).name == config.method
    assert RunConfig.from_dict(config.to_dict()) == config
    assert path.read_text().startswith("# ")  # says what it is


def test_default_yaml_is_the_default() -> None:
    values = read_yaml(CONFIGS / "default.yaml")
    assert RunConfig.from_dict(values) == RunConfig()
    assert values.keys() == RunConfig().to_dict().keys()  # every key is there to be seen
    for section in ("initialise", "blocks", "distill", "loss"):
        assert values[section].keys() == RunConfig().to_dict()[section].keys()


@pytest.mark.parametrize("name", ["binarymos-paper", "onebit-paper"])
def test_paper_recipe_to_the_letter(name: str) -> None:
    config = RunConfig.from_yaml(CONFIGS / f"{name}.yaml")
    method: Any = method_config(config.method, config.options)
    assert config.method == name.removesuffix("-paper")
    assert method.num_experts == (4 if config.method == "binarymos" else 1)
    assert (method.iterations, method.distinct_experts, method.latent_magnitude) == (0, False, None)
    assert not config.initialise.activation_aware and not config.blocks.enabled and config.skip == []
    distill = config.distill
    assert distill.enabled and distill.train == "all" and not distill.train_norms and not distill.int8_teacher
    assert distill.expert_share == 1
    assert (distill.lr_latent, distill.lr_scale, distill.lr_router) == (2e-5, 2e-5, 2e-5)
    assert (distill.beta1, distill.beta2, distill.weight_decay) == (0.9, 0.999, 0.0)
    assert (distill.schedule, distill.warmup, distill.clip) == ("cosine", 0.03, 1 / 2048)
    assert distill.epsilon == 1e-8 / 2048  # as small beside the gradients of a mean as theirs beside those of a sum
    assert (distill.batch_size, distill.accumulate, config.sequence_length) == (4, 1, 2048)
    assert (distill.hidden_weight, distill.relative_weight, distill.temperature, distill.teacher) == (10.0, 0.0, 1.0, "live")
    assert config.embedding_bits == 16 and config.minutes is None
    assert config.tokens is not None and config.tokens == pytest.approx(196e6, rel=0.01)
    assert distill.distinct_tokens == pytest.approx(config.tokens / 3, rel=0.01)  # three epochs
    assert "c4" in config.data and "wikitext-2" in config.data


def test_dbllm_paper_recipe() -> None:
    config = RunConfig.from_yaml(CONFIGS / "dbllm-paper.yaml")
    method: Any = method_config(config.method, config.options)
    assert config.method == "dbllm" and config.data == "self" and method.group_size == 64
    assert (method.iterations, method.compensation, method.relative_latents) == (0, 0, False)
    assert not config.distill.int8_teacher and RunConfig().distill.int8_teacher
    assert (config.loss.dad, config.loss.dad_gamma, config.loss.dad_lambda) == (True, 0.1, 0.1)
    assert not RunConfig().loss.dad and RunConfig().loss.dad_gamma == RunConfig().loss.dad_lambda == 0.1
    assert config.initialise.activation_aware and not config.initialise.refit and not config.blocks.enabled
    chosen = RunConfig.from_dict(override({}, ["loss.dad=true", "loss.dad_lambda=1e-1", "loss.dad_gamma=0.3"]))
    assert (chosen.loss.dad, chosen.loss.dad_lambda, chosen.loss.dad_gamma) == (True, 0.1, 0.3)


def test_paper_recipes_differ_in_the_method_alone() -> None:
    moe, one = (RunConfig.from_yaml(CONFIGS / f"{name}-paper.yaml").to_dict() for name in ("binarymos", "onebit"))
    assert {key for key, value in moe.items() if value != one[key]} == {"method", "options"}


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"metod": "sign"}, ["metod", "method"]),
        ({"distill": {"lr": 1e-3}}, ["distill.lr", "lr_latent"]),
        ({"distill": 3}, ["'distill'", "section"]),
        ({"blocks": None}, ["'blocks'", "section"]),
        ({"seed": "many"}, ["seed='many'", "int"]),
        ({"seed": 1.5}, ["seed=1.5", "int"]),
        ({"seed": True}, ["seed=True", "int"]),
        ({"tokens": "inf"}, ["tokens='inf'"]),
        ({"blocks": {"enabled": "yes please"}}, ["blocks.enabled='yes please'", "bool"]),
        ({"blocks": {"enabled": 1}}, ["blocks.enabled=1", "bool"]),
        ({"data": 3}, ["data=3", "str"]),
        ({"skip": "down_proj"}, ["skip='down_proj'", "list"]),
        ({"options": ["a"]}, ["options=['a']", "dict"]),
        ({"embedding_bits": 4}, ["embedding_bits=4", "8, 16"]),
        ({"embedding_bits": "8"}, ["embedding_bits='8'"]),
        ({"distill": {"schedule": "sine"}}, ["distill.schedule='sine'", "cosine, linear, constant"]),
        ({"distill": {"teacher": "cached"}}, ["cached", "distill.distinct_tokens"]),
        ({"tokens": 100, "distill": {"teacher": "cached", "hidden_weight": 10}}, ["logits only"]),
        ({"tokens": 0}, ["0 tokens"]),
        ({"tokens": -5}, ["-5 tokens"]),
        ({"minutes": -0.5}, ["-0.5 minutes"]),
        ({"minutes": 0}, ["0.0 minutes"]),
        ({"minutes": float("nan")}, ["minutes=nan"]),
        ({"tokens": 5, "minutes": 5}, ["not both"]),
        ({"sequence_length": 0}, ["sequence_length=0"]),
        ({"blocks": {"tokens": -1}}, ["blocks.tokens=-1"]),
        ({"distill": {"batch_size": 0}}, ["distill.batch_size=0"]),
        ({"distill": {"distinct_tokens": 0}}, ["distill.distinct_tokens=0"]),
        ({"initialise": {"sequences": 0}}, ["initialise.sequences=0"]),
        ({"blocks": {"share": 1.5}}, ["blocks.share=1.5"]),
        ({"distill": {"warmup": -0.1}}, ["distill.warmup=-0.1"]),
        ({"distill": {"temperature": 0}}, ["distill.temperature=0.0"]),
        ({"distill": {"lr_latent": float("nan")}}, ["distill.lr_latent=nan"]),
        ({"distill": {"beta2": 1.0}}, ["distill.beta2=1.0"]),
        ({"distill": {"relative_weight": -1}}, ["distill.relative_weight=-1.0"]),
    ],
)
def test_wrong_options_are_named(values: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(BimosError) as caught:
        RunConfig.from_dict(values, "my.yaml")
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message


def test_numbers_as_people_write_them() -> None:
    config = RunConfig.from_dict({"distill": {"lr_latent": "1e-3", "clip": 2}, "tokens": "2e6", "seed": 3.0})
    assert (config.distill.lr_latent, config.distill.clip, config.tokens, config.seed) == (1e-3, 2.0, 2_000_000, 3)
    assert isinstance(config.distill.clip, float) and isinstance(config.tokens, int) and isinstance(config.seed, int)


def test_absent_values() -> None:
    assert RunConfig.from_dict({}) == RunConfig()
    assert RunConfig.from_dict({"tokens": None, "distill": {"distinct_tokens": None}}) == RunConfig()
    with pytest.raises(BimosError, match="seed=None"):
        RunConfig.from_dict({"seed": None})


def test_a_config_does_not_share_its_lists() -> None:
    RunConfig().skip.append("down_proj")
    RunConfig().options["num_experts"] = 1
    assert RunConfig().skip == [] and RunConfig().options == {}


# Files


def test_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: sign\ndistill:\n  lr_latent: 1e-3\n")
    config = RunConfig.from_yaml(path)
    assert config.method == "sign" and config.distill.lr_latent == 1e-3
    path.write_text("")
    assert RunConfig.from_yaml(path) == RunConfig()


@pytest.mark.parametrize(
    ("text", "fragment"), [("a: [1", "not YAML"), ("- a\n- b\n", "mapping"), ("just words", "mapping"), ("speed: 3", "speed")]
)
def test_files_that_are_no_config(tmp_path: Path, text: str, fragment: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(BimosError, match=fragment) as caught:
        RunConfig.from_yaml(path)
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00binary"])
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BimosError, match=r"mine\.yaml") as caught:
        RunConfig.from_yaml(path)
    assert "\n" not in str(caught.value)


# --set


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed=7", {"seed": 7}),
        ("distill.lr_latent=1e-3", {"distill": {"lr_latent": "1e-3"}}),  # YAML 1.1; `from_dict` makes it a number
        ("skip=[down_proj, o_proj]", {"skip": ["down_proj", "o_proj"]}),
        ("options={num_experts: 2}", {"options": {"num_experts": 2}}),
        ("options.num_experts=2", {"options": {"num_experts": 2}}),
        ("blocks.enabled=false", {"blocks": {"enabled": False}}),
        ("distill.distinct_tokens=null", {"distill": {"distinct_tokens": None}}),
        ("data=a=b.txt", {"data": "a=b.txt"}),
        ("data=", {"data": None}),
        ("data=[broken", {"data": "[broken"}),
    ],
)
def test_set(assignment: str, expected: dict[str, Any]) -> None:
    assert override({}, [assignment]) == expected


def test_set_goes_over_the_file_and_leaves_it_alone() -> None:
    values = {"seed": 1, "distill": {"clip": 2.0, "warmup": 0.1}}
    changed = override(values, ["distill.clip=1e-1", "seed=2", "seed=3"])
    assert changed == {"seed": 3, "distill": {"clip": "1e-1", "warmup": 0.1}}
    assert values == {"seed": 1, "distill": {"clip": 2.0, "warmup": 0.1}}
    assert RunConfig.from_dict(changed).distill.clip == 0.1


@pytest.mark.parametrize(("assignment", "fragment"), [("seed", "key=value"), ("=3", "key=value"), ("seed.x=3", "'seed' is a value")])
def test_set_in_the_wrong_form(assignment: str, fragment: str) -> None:
    with pytest.raises(BimosError, match=fragment):
        override({"seed": 1}, [assignment])


def test_a_list_of_the_wrong_kind() -> None:
    with pytest.raises(BimosError, match=r"skip=\[1\]: must be of type list\[str\]"):
        RunConfig.from_dict({"skip": [1]})


def test_tokens_for_no_distillation() -> None:
    with pytest.raises(BimosError, match="budget of distillation, which is off"):
        RunConfig.from_dict({"tokens": 5, "distill": {"enabled": False}})


def test_what_is_left_to_the_method() -> None:
    default = RunConfig()
    trained = default.settled(method_config("binarymos"))
    assert trained.blocks.enabled and trained.distill.enabled and trained.initialise.refit
    untrained = default.settled(method_config("gptq2"))
    assert (untrained.blocks.enabled, untrained.distill.enabled, untrained.initialise.refit) == (False, False, False)
    asked = RunConfig.from_dict({"tokens": 64, "distill": {"enabled": True}}).settled(method_config("gptq2"))
    assert asked.distill.enabled and not asked.blocks.enabled
    with pytest.raises(BimosError, match=r"method 'gptq2' is not trained: leave out --tokens, or set distill.enabled=true"):
        RunConfig.from_dict({"method": "gptq2", "tokens": 64}).settled(method_config("gptq2"))
    with pytest.raises(BimosError, match="budget of distillation, which is off"):
        RunConfig.from_dict({"tokens": 64, "distill": {"enabled": False}})
    rates = [default.settled(method_config("binarymos", {"planes": planes})).distill.lr_latent for planes in (1, 2)]
    assert rates == [7e-4, 1.5e-4]
    given = RunConfig.from_dict({"distill": {"lr_latent": 3e-4}})
    assert given.settled(method_config("binarymos", {"planes": 2})).distill.lr_latent == 3e-4
