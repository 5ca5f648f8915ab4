"""Files of benchmarks: found in a folder or downloaded at their pinned commit, and checked by their digest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
from huggingface_hub import constants, hf_hub_download

from diffalign.core.files import aside
from diffalign.core.fingerprint import of_file
from diffalign.evaluation.suite.base import Benchmark, DataFile, SuiteError

DATASETS = "datasets/"
TIMEOUT = 60.0


def locate(
    benchmark: Benchmark, data: Path | None, *, allow_other: bool = False
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Return the files of a benchmark, and what results record of them.

    Args:
        data: folder with the files, or with a folder of the benchmark's name; None downloads them.
        allow_other: accept files of another digest, which results then say.

    Raises:
        SuiteError: a file is missing, cannot be downloaded, or is not the published one.
    """
    paths, records = [], []
    for file in benchmark.files:
        path = _downloaded(file) if data is None else _within(data, benchmark, file)
        digest = of_file(path)
        other = file.sha256 is not None and digest != file.sha256
        if other and not allow_other:
            raise SuiteError(
                f"data={path}: not the file that {benchmark.name} is defined on (sha256 {digest[:12]}, expected "
                f"{str(file.sha256)[:12]} of {file.repository}@{file.commit[:7]}). Take that file, or allow another "
                "one with `allow_other_data`; its figures do not compare with published ones"
            )
        paths.append(path)
        records.append(
            {
                "file": file.path,
                "repository": file.repository,
                "commit": file.commit,
                "sha256": digest,
                "published": not other and file.sha256 is not None,
                "licence": benchmark.licence,
            }
        )
    return paths, records


def _within(data: Path, benchmark: Benchmark, file: DataFile) -> Path:
    places = (
        data / benchmark.folder / file.name,
        data / benchmark.folder / file.path,
        data / file.name,
        data / file.path,
    )
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise SuiteError(
            f"data={data}: {benchmark.name} needs {file.name}, which is not there. Put {file.repository}'s "
            f"{file.path} (commit {file.commit[:7]}) into it"
        )
    return path


def _downloaded(file: DataFile) -> Path:
    """Return the path of a file at its commit, downloaded once."""
    if file.repository.startswith(DATASETS):
        name = file.repository.removeprefix(DATASETS)
        return Path(
            hf_hub_download(name, file.path, repo_type="dataset", revision=file.commit or None)
        )
    home = Path(constants.HF_HOME) / "diffalign-benchmarks"
    path = home / file.repository.replace("/", "--") / file.commit / file.path
    if path.is_file():
        return path
    address = f"https://raw.githubusercontent.com/{file.repository}/{file.commit}/{file.path}"
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1":
        raise SuiteError(
            f"{file.name} is not on this machine, and HF_HUB_OFFLINE forbids downloads. Name a folder that has "
            f"it as `data` (from {address})"
        )
    try:
        answer = requests.get(address, timeout=TIMEOUT)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise SuiteError(
            f"{address} could not be downloaded: {error}. Name a folder that has {file.name} as `data`"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as hidden:
        hidden.write_bytes(answer.content)
    return path


def check_language(texts: Sequence[str], language: str, name: str) -> None:
    """Raise SuiteError for prompts in another script than the benchmark's rule reads."""
    if language == "any":
        return
    letters = [c for text in texts for c in text if c.isalpha()]
    cjk = sum("\u3040" <= c <= "\u9fff" or "\uac00" <= c <= "\ud7a3" for c in letters)
    is_cjk = cjk > len(letters) / 2
    if letters and is_cjk != (language == "cjk"):
        raise SuiteError(
            f"benchmarks={name}: the prompts are in another language than the benchmark's rule reads. Take the "
            "file of its own language"
        )
