"""A LoRA is found by a file, a folder or a hub id, with the configuration that belongs to it."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from diffalign import cli
from diffalign.core.errors import UsageError
from diffalign.lora import files, source
from diffalign.training import rerun, run_folder

VERBS = {
    "generate": ["generate", "x", "--model=shapes-sd3", "--output_dir=o"],
    "evaluate": ["evaluate", "--model=shapes-sd3"],
    "merge": ["merge", "--model=shapes-sd3", "--output_dir=o"],
}


@pytest.mark.parametrize("verb", [*VERBS, "convert"])
@pytest.mark.parametrize(
    "path", ["nothere", "runs/nothere", "./a/b", "/no/where.safetensors", "a/b/c"]
)
def test_a_mistyped_path_is_one_line_before_the_model_is_loaded(
    verb, path, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    flags = [*VERBS[verb], f"--lora={path}"] if verb in VERBS else []
    flags = flags or ["convert", path, "--to=diffusers", "--output=o.safetensors"]
    monkeypatch.setattr("diffalign.cli.models.load_model", None)
    assert cli.main(flags) == 2
    error = capsys.readouterr().err.strip()
    assert f"lora: {path} does not exist" in error
    assert "\n" not in error


@pytest.mark.parametrize(
    "error", [OSError("no\nconnection"), ValueError("bad id"), RuntimeError("closed client")]
)
def test_what_the_hub_says_is_one_line(error, monkeypatch):
    def refuse(*_):
        raise error

    monkeypatch.setattr(source, "_download", refuse)
    with pytest.raises(UsageError, match="someone/lora is no path that exists") as caught:
        files.read_lora("someone/lora:a.safetensors")
    assert "\n" not in str(caught.value)


def test_folders_are_looked_through(tmp_path):
    state = {f"transformer.x_embedder.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(state, tmp_path / "my style.safetensors")
    assert len(files.read_lora(str(tmp_path))) == 1
    save_file(state, tmp_path / "._my style.safetensors")
    assert len(files.read_lora(str(tmp_path))) == 1
    save_file(state, tmp_path / "another.safetensors")
    with pytest.raises(UsageError, match=r"has 2 \.safetensors files \(another"):
        files.read_lora(str(tmp_path))
    assert len(files.read_lora(f"{tmp_path}:another.safetensors")) == 1
    with pytest.raises(UsageError, match="has no third"):
        files.read_lora(f"{tmp_path}:third.safetensors")
    save_file(state, tmp_path / source.WEIGHT_NAME)
    assert len(files.read_lora(str(tmp_path))) == 1
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="pickles"):
        files.read_lora(str(tmp_path / "x.bin"))


def one_layer(file, alpha=None):
    """Save a LoRA of one layer and rank 2; return the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {f"transformer.x_embedder.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    if alpha is not None:
        state["transformer.x_embedder.alpha"] = torch.tensor(alpha)
    save_file(state, file)
    return file


def alpha_of(source):
    return files.read_lora(str(source)).parts["transformer"]["x_embedder"].alpha


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_configuration_belongs_to_peft_s_own_file(encoding, tmp_path):
    config = tmp_path / source.CONFIG_NAME
    config.write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 7}', encoding=encoding)
    other = one_layer(tmp_path / "step100.safetensors")
    assert alpha_of(other) == 7
    one_layer(tmp_path / source.PEFT_NAME)
    assert alpha_of(tmp_path) == 7
    with pytest.raises(UsageError, match=f"step100.* no alpha.* name .*{source.PEFT_NAME}, or put"):
        files.read_lora(str(other))
    assert alpha_of(one_layer(other, 3.0)) == 3
    (tmp_path / source.PEFT_NAME).rename(tmp_path / "step50.safetensors")
    with pytest.raises(UsageError, match="step50.* no alpha.* files: put step50.safetensors into"):
        files.read_lora(str(tmp_path / "step50.safetensors"))


@pytest.mark.parametrize("text", ["[1]", "{", '{"r": 1, "r": 2}'])
def test_a_configuration_that_is_none_is_named(text, tmp_path):
    one_layer(tmp_path / source.PEFT_NAME)
    (tmp_path / source.CONFIG_NAME).write_text(text)
    with pytest.raises(UsageError, match=source.CONFIG_NAME):
        files.read_lora(str(tmp_path))


@pytest.mark.parametrize("below", ["default", "checkpoint-5/lora"])
def test_the_only_lora_below_a_folder_is_read(below, tmp_path):
    file = one_layer(tmp_path / below / source.PEFT_NAME)
    file.with_name(source.CONFIG_NAME).write_text('{"lora_alpha": 7}')
    assert alpha_of(tmp_path) == 7
    one_layer(tmp_path / "old" / source.WEIGHT_NAME)
    with pytest.raises(UsageError, match=f"2 LoRAs are below it .*{below}.*Name one of them"):
        files.read_lora(str(tmp_path))
    assert alpha_of(f"{tmp_path}:{below}") == 7


@pytest.mark.parametrize("place", ["", "lora", "lora/pytorch_lora_weights.safetensors"])
def test_the_run_of_a_lora_is_the_folder_that_holds_it(place, tmp_path):
    one_layer(tmp_path / "lora" / source.WEIGHT_NAME)
    assert rerun.run_of(str(tmp_path / place)) is None
    for name in (run_folder.CONFIG, run_folder.LOG):
        (tmp_path / name).touch()
    assert rerun.run_of(str(tmp_path / place)) == tmp_path


@pytest.mark.parametrize("name", ["style.safetensors", source.PEFT_NAME])
def test_the_configuration_is_downloaded_with_the_hub_s_only_lora(name, tmp_path, monkeypatch):
    one_layer(tmp_path / "hub" / name)
    (tmp_path / "hub" / source.CONFIG_NAME).write_text('{"lora_alpha": 7}')

    def download(_, name):
        (tmp_path / "cache").mkdir(exist_ok=True)
        return shutil.copy(tmp_path / "hub" / name, tmp_path / "cache" / name)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    listing = [name, source.CONFIG_NAME]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_: listing)
    assert alpha_of("someone/lora") == 7
