"""Files of a stranger: YAML that grows, code beside a model, images elsewhere, folders that cannot be written to."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image
from short_runs import trainer
from tiny_models import tiny_model, word_tokenizer
from vision_models import processor

from prefopt import DPOConfig, DPOTrainer
from prefopt.cli.main import main
from prefopt.cli.model_config import ScriptArguments
from prefopt.cli.run_file import read_run_file
from prefopt.cli.train import image_roots
from prefopt.data import DatasetMixtureConfig, PrepareOptions, load_source, prepare_dataset
from prefopt.data.image_roots import DEFAULT_ROOTS, located

QUICK = 10.0
"""Seconds: a bomb would take hours."""

# -- YAML --------------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a0 [ha, ha]\n" + "".join(f"b{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
YAML = {
    "laughs": (LAUGHS, "has more than 20,000 entries"),
    "laughs of merged keys": (
        "a: &a0 {x: 1}\n" + "".join(f"b{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)),
        "has more than 20,000 entries",
    ),
    "many entries": ("beta: [" + "a," * 90_000 + "]\n", "has more than 20,000 entries"),
    "holds itself": ("beta: &a [*a]\n", "has more than 20,000 entries"),
    "object": ("beta: !!python/object/apply:os.system ['touch OWNED']\n", "could not determine a constructor"),
    "name": ("beta: !!python/name:os.system\n", "could not determine a constructor"),
    "twice": ("beta: 1\nseed: 2\nbeta: 3\n", "run.yaml:3: 'beta' stands here and in line 1"),
    "twice below": ("datasets:\n- path: a\n  path: b\n", "run.yaml:3: 'path' stands here and in line 2"),
    "deep": ("beta: " + "[" * 50_000, "nested too deep"),
    "large": ("# " + "x" * 200_001, "more than the 200,000"),
    "no date": ("beta: 2001-99-99\n", "is no valid YAML"),
    "many digits": ("beta: " + "9" * 10_000, "run.yaml:1: a number of 10,000 characters"),
    "base 60": ("beta: 1" + ":1" * 90_000, "run.yaml:1: a number of 180,001 characters"),
    "base 60 with a point": ("beta: 1" + ":1" * 90_000 + ".0", "run.yaml:1: a number of 180,003 characters"),
    "no text": (b"beta: \xff\xfe", "is no valid YAML"),
}


@pytest.mark.parametrize("name", YAML)
@pytest.mark.parametrize("place", ["run file", "accelerate config"])
def test_yaml_is_refused_in_time(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = YAML[name]
    Path("run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["--config", "run.yaml"] if place == "run file" else ["--accelerate_config", "run.yaml"]
    start = time.monotonic()
    named = ["--model_name_or_path", "nowhere", "--dataset_name", "nowhere.jsonl"]
    assert main(["dpo", "--output_dir", "out", *named, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert time.monotonic() - start < QUICK
    assert not Path("OWNED").exists()


def test_aliases_that_are_small_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("datasets:\n- &a {path: x, columns: {prompt: q}}\n- {<<: *a, path: y}\n")
    [_, second] = read_run_file(path).values["datasets"]
    assert second == {"path": "y", "columns": {"prompt": "q"}}


# -- code --------------------------------------------------------------------------------------------------------------

CODE = "from pathlib import Path\nPath({!r}).write_text('ran')\n"


def model_with_code(folder: Path, part: str) -> Path:
    """A model whose files name a module beside them, which leaves a mark when it is imported."""
    tiny_model(seed=1).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "theirs.py").write_text(CODE.format(str(folder / "OWNED")) + "class Theirs: ...\n")
    names = {"config": ["AutoConfig", "AutoModelForCausalLM"], "tokenizer_config": ["AutoTokenizer"]}
    if part == "processor_config":
        (folder / "processor_config.json").write_text("{}")
    path = folder / f"{part}.json"
    values = json.loads(path.read_text())
    values["auto_map"] = dict.fromkeys(names.get(part, ["AutoProcessor"]), "theirs.Theirs")
    if part == "config":
        values["model_type"] = "theirs"
    if part == "tokenizer_config":
        values["tokenizer_class"] = "Theirs"
        values["auto_map"] = {"AutoTokenizer": ["theirs.Theirs", None]}
    path.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("part", ["config", "tokenizer_config", "processor_config"])
def test_code_beside_a_model_does_not_run_unless_allowed(part: str, tmp_path: Path) -> None:
    folder = model_with_code(tmp_path / "model", part)
    rows = Dataset.from_list([{"prompt": "baba", "chosen": " dada", "rejected": " fafa"}] * 4)

    def make(**options: Any) -> None:
        config = DPOConfig(str(tmp_path / "out"), report_to="none", **options)
        with contextlib.suppress(Exception):  # with or without the flag these files make no model
            DPOTrainer(str(folder), args=config, train_dataset=rows)

    make()
    assert not (folder / "OWNED").exists()
    make(trust_remote_code=True)
    assert (folder / "OWNED").exists() or part == "processor_config"


@pytest.mark.parametrize("name", ["data.py", "{folder}.py"])
def test_scripts_of_a_data_set_do_not_run(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    script = folder / name.format(folder="rows")
    script.write_text(CODE.format(str(tmp_path / "OWNED")))
    for path in (folder, script):
        with pytest.raises((ValueError, FileNotFoundError), match="rows"):
            load_source(str(path), split="train")
    assert not (tmp_path / "OWNED").exists()


# -- images ------------------------------------------------------------------------------------------------------------


def escapes(inside: Path, outside: Path) -> dict[str, Any]:
    """Spellings of an image that is not within the folder of the data."""
    (inside / "link.png").symlink_to(outside)
    (inside / "up").symlink_to(outside.parent)
    path = os.path.relpath(outside, inside)
    return {
        "absolute": str(outside),
        "upwards": path,
        "upwards within": f"{inside}/a/../../{outside.parent.name}/{outside.name}",
        "link": "link.png",
        "linked folder": str(inside / "up" / outside.name),
        "file URL": outside.as_uri(),
        "file URL, quoted": "file://" + str(outside).replace("/", "%2F"),
        "mapping": {"bytes": None, "path": str(outside)},
        "http": "http://127.0.0.1:9/a.png",
        "https": "https://example.org/a.png",
        "other": "memory://a.png",
        "chained": f"simplecache::file://{outside}",
        "local": f"local://{outside}",
        "sibling": str(inside) + "-more/a.png",
    }


def test_images_stay_within_their_folder(tmp_path: Path, figure: Callable[[str, str], None]) -> None:
    inside, outside = tmp_path / "rows", tmp_path / "private" / "a.png"
    for folder in (inside / "a", outside.parent, tmp_path / "rows-more"):
        folder.mkdir(parents=True)
    for path in (outside, inside / "own.png", tmp_path / "rows-more" / "a.png"):
        Image.new("RGB", (16, 16)).save(path)
    made = processor("llava")
    row = {"prompt": "<image> A?", "chosen": "B.", "rejected": "C."}
    options = PrepareOptions(("chosen", "rejected"), None, "keep_start", image_roots=(str(inside),))

    def prepare(value: Any, options: PrepareOptions = options) -> Any:
        return prepare_dataset(Dataset.from_list([{**row, "images": [value]}]), made, options, name="train")

    for own in ("own.png", str(inside / "own.png"), (inside / "own.png").as_uri()):
        assert len(prepare(own)) == 1
    tried = escapes(inside, outside)
    for value in tried.values():
        with pytest.raises(ValueError, match=r"row 0, column 'images': .*image_roots"):
            prepare(value)
    wider = PrepareOptions(("chosen", "rejected"), None, "keep_start", image_roots=(str(tmp_path),))
    assert len(prepare(str(outside), wider)) == 1
    figure("image paths", f"{len(tried)} ways out of the data's folder refused")


def test_a_local_set_adds_its_folder_to_the_caches(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    mixture = DatasetMixtureConfig()
    roots = image_roots(ScriptArguments(dataset_name=str(tmp_path / "rows.jsonl")), mixture)
    assert roots == [str(tmp_path), *DEFAULT_ROOTS[1:]]
    assert image_roots(ScriptArguments(dataset_name="of/the-hub"), mixture) == []


def test_addresses_within_a_root_are_compared_by_their_parts() -> None:
    roots = ["https://images.example.org/cats"]
    assert located("https://images.example.org/cats/1.png", roots)
    for other in ("https://images.example.org/catsy.png", "https://images.example.org/cats/../dogs/1.png"):
        with pytest.raises(ValueError, match="image_roots"):
            located(other, roots)


def test_a_picture_that_would_fill_the_memory_is_named() -> None:
    """A PNG of 30,000 x 30,000 points in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (30_000).to_bytes(4, "big")
    header = chunk(b"IHDR", size + size + bytes([1, 0, 0, 0, 0]))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")
    row = {"prompt": "<image> A?", "chosen": "B.", "rejected": "C."}
    uri = "data:image/png;base64," + base64.b64encode(bomb).decode()
    for value in (bomb, uri):
        rows = Dataset.from_list([{**row, "images": [value]}])
        with pytest.raises(ValueError, match=r"row 0, column 'images': .*DecompressionBomb"):
            prepare_dataset(
                rows, processor("llava"), PrepareOptions(("chosen", "rejected"), 64, "keep_start"), name="x"
            )


# -- the folder of a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a file", "within a file", "a link to nothing"])
def test_a_folder_that_cannot_be_written_is_named_before_the_model_loads(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    if kind == "a link to nothing":
        path.symlink_to(tmp_path / "gone")
    else:
        path.write_text("")
    folder = path / "run" if kind == "within a file" else path
    with pytest.raises(ValueError, match=r"output_dir=.*is (a file|a link to nothing), not a folder"):
        trainer(folder, model="no such model")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_of_others_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="may not be written to"):
        trainer(tmp_path / "out", model="no such model")


def test_a_link_to_a_folder_is_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    trainer(tmp_path / "out")
