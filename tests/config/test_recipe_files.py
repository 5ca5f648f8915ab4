"""Recipe files as people have them: any encoding, keys that are there twice, paths beside the recipe."""

import pytest

from diffalign.config import ConfigError, load, recipes
from diffalign.config.files import beside


def recipe(tmp_path, text, name="a.yaml", codec="utf-8"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(codec) if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.yaml", "a.YML"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_encoding_is_read(tmp_path, codec, name, end):
    text = end.join(["extends: demo", "# für mich", "optimizer:", "  learning_rate: 1e-4", ""])
    assert load(recipe(tmp_path, text, name, codec)).optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: \xff", r"a.yaml:1 is not readable: byte 0xff at offset 3 is not UTF-8"),
        ("a: [\n b: 3\n", r"a.yaml:2 is not valid YAML: expected ',' or '\]'"),
        ("[" * 5000, "nested too deep"),
        ("seed: 2020-13-45", "is not valid YAML: month must be"),
        ("- demo", "must hold a mapping"),
        ("0", "must hold a mapping"),
        ("lora: {rank: 3}\nlora: {rank: 4}", "a.yaml:2 .* the key 'lora' stands there twice"),
        ("lora:\n  rank: 3\n  rank: 4", "a.yaml:3 .* the key 'rank' stands there twice"),
        ("optimizer.learning_rate: 1", "in a recipe write `optimizer: {learning_rate: ...}`"),
        ("seed: 10", "'seed' is a flag's name: in a recipe write `training: {seed: ...}`"),
        ("resolution: 64", r"write `rollout: {height: ...}; rollout: {width: ...}`"),
        ("targets: attn.to_q", "unknown setting 'targets'; did you mean 'lora.targets'"),
        ("lora: {rnk: 3}", "unknown setting 'lora.rnk'; did you mean 'lora.rank'"),
        ("extends: ../nowhere.yaml", "there is no /.*nowhere.yaml"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(recipe(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--rewards={jpeg: 1, jpeg: 2}", "rewards=.* the key 'jpeg' stands there twice"),
        ("--training.seed=2020-13-45", "training.seed=2020-13-45 is not valid YAML: month"),
        ("--rewards={jpeg: 1", "rewards={jpeg: 1:1 is not valid YAML"),
        ("--nowhere=@x", "unknown setting 'nowhere'"),
        ("--training.seed=" + "9" * 5000, "training.seed"),
    ],
)
def test_what_is_wrong_with_a_flag_is_one_line(flag, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load("demo", [flag])
    assert "\n" not in str(caught.value)


def test_a_recipe_that_extends_itself_by_another_way_is_refused(tmp_path):
    path = recipe(tmp_path, f"extends: ../{tmp_path.name}/a.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        load(path)


@pytest.mark.parametrize("text", ["attn.to_q, attn.to_k", "[attn.to_q, attn.to_k]"])
def test_a_list_may_be_a_text_with_commas(tmp_path, text):
    config = load(recipe(tmp_path, f"extends: demo\nlora:\n  targets: {text}\n"))
    assert config.lora.targets == ["attn.to_q", "attn.to_k"]


class TestPaths:
    def config(self, tmp_path, monkeypatch, text):
        (tmp_path / "r" / "data").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "r" / "p.txt").write_text("a red circle")
        recipe(tmp_path, text, "r/a.yaml")
        return load("r/a.yaml")

    def test_stand_beside_the_recipe(self, tmp_path, monkeypatch):
        text = "extends: demo\nprompts: {train: p.txt, evaluation: p.txt}\nmodel: {name: ./data}"
        config = self.config(tmp_path, monkeypatch, text)
        assert (config.prompts.train, config.prompts.evaluation) == ("r/p.txt", "r/p.txt")
        assert config.model.name == "r/data"
        recipe(tmp_path, "extends: r/a.yaml\n", "b.yaml")
        assert load("b.yaml").prompts.train == "r/p.txt"
        recipe(tmp_path, "extends: a.yaml\n", "r/b.yaml")
        assert load("r/b.yaml", ["--prompts.train=p.txt"]).prompts.train == "p.txt"

    def test_or_else_in_the_working_directory(self, tmp_path, monkeypatch, caplog):
        (tmp_path / "q.txt").write_text("x")
        config = self.config(tmp_path, monkeypatch, "extends: demo\nprompts: {train: q.txt}")
        assert config.prompts.train == "q.txt"
        assert not caplog.text
        (tmp_path / "r" / "q.txt").write_text("y")
        assert load("r/a.yaml").prompts.train == "r/q.txt"
        assert "beside the recipe is read" in caplog.text

    def test_names_are_no_paths(self, tmp_path, monkeypatch):
        text = "extends: demo\nmodel: {name: shapes-sd3}\nprompts: {train: geneval}"
        self.config(tmp_path, monkeypatch, text)
        for name in ("geneval", "shapes-sd3"):
            (tmp_path / "r" / name).mkdir()
        config = load("r/a.yaml")
        assert (config.model.name, config.prompts.train) == ("shapes-sd3", "geneval")

    def test_rewards_of_a_file_are_paths(self, tmp_path, monkeypatch):
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "mine.py").write_text("")
        raw = {
            "rewards": {"mine.py:light": 1.0, "jpeg": 1.0},
            "evaluation": {"rewards": ["mine.py:x"]},
        }
        found = beside(raw, tmp_path / "r")
        assert list(found["rewards"]) == [f"{tmp_path}/r/mine.py:light", "jpeg"]
        assert found["evaluation"]["rewards"] == [f"{tmp_path}/r/mine.py:x"]

    def test_folders_of_pairs_are(self, tmp_path, monkeypatch):
        text = "extends: inversion-dpo\npairs: {source: data}"
        assert self.config(tmp_path, monkeypatch, text).pairs.source == "r/data"


@pytest.mark.parametrize("name", [r for r in recipes() if r.startswith(("awm-", "inversion-dpo-"))])
def test_recipes_for_published_models_watch_two_rewards(name):
    """None of them is trained on, and each is another than the others."""
    config = load(name, [])
    if config.model.name.startswith("shapes"):
        return
    watched = list(config.evaluation.rewards)
    if not config.trains_on_rewards:
        watched += list(config.rewards)
    assert len(set(watched)) >= 2
    assert config.training.eval_every > 0
