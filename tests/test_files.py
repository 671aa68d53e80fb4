"""Files appear whole or not at all, also on file systems that offer less than a local disk."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import timm

from inmerge_wrap import export_timm, export_weights
from inmerge_wrap.files import replacing, replacing_files, sync, write_json

CALLS = ("chmod", "fsync")


def share(monkeypatch: pytest.MonkeyPatch, code: int) -> list[str]:
    """Makes the two calls that network shares refuse answer an error; returns those refused."""
    refused = []

    def refusing(name: str) -> None:
        def call(*_: object, **__: object) -> None:
            refused.append(name)
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, name, call)

    for name in CALLS:
        refusing(name)
    return refused


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL, errno.ENOTSUP])
def test_an_export_survives_a_share_that_offers_neither_modes_nor_synchronisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    network = timm.create_model("test_resnet", num_classes=2)
    refused = share(monkeypatch, code)
    export_weights(network, tmp_path / "weights.safetensors")
    export_timm(network, tmp_path / "net", input_size=(3, 32, 32), mean=[0.5] * 3, std=[0.5] * 3)
    write_json(tmp_path / "result.json", {"auroc": 0.5})
    assert set(refused) == set(CALLS)
    monkeypatch.undo()
    timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "net", "result.json", "weights.safetensors",
    ]  # fmt: skip


def test_a_device_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "result.json", {"run": 1})
    share(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_json(tmp_path / "result.json", {"run": 2})
    assert json.loads((tmp_path / "result.json").read_text()) == {"run": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync(tmp_path)


def test_new_files_have_the_mode_that_the_process_gives_to_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    network = timm.create_model("test_resnet", num_classes=2)
    export_weights(network, tmp_path / "weights.safetensors")
    export_timm(network, tmp_path / "net", input_size=(3, 32, 32), mean=[0.5] * 3, std=[0.5] * 3)
    write_json(tmp_path / "result.json", {})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert len({path.stat().st_mode for path in files}) == 1


def test_writers_and_readers_at_once_see_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"values": [0] * 1000})
    seen, errors, over = set(), [], threading.Event()

    def read() -> None:
        while not over.is_set():
            seen.update(json.loads(path.read_text())["values"])

    def write(value: int) -> None:
        try:
            for _ in range(50):
                write_json(path, {"values": [value] * 1000})
        except OSError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(value,)) for value in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    reader.join()
    assert errors == [] and seen <= set(range(4)) and seen
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk" / "result.json", tmp_path / "result.json"
    link.symlink_to(disk)  # which does not exist yet
    for run in range(2):
        write_json(link, {"run": run})
        assert link.is_symlink() and json.loads(disk.read_text()) == {"run": run}
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_an_error_of_another_file_names_that_file(tmp_path: Path) -> None:
    missing = tmp_path / "images" / "1.png"
    for write in (replacing, replacing_files):
        with pytest.raises(FileNotFoundError) as caught, write(tmp_path / "result"):
            missing.read_bytes()
        assert caught.value.filename == str(missing) and "not written" not in str(caught.value)


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "new" / "a.txt") as draft:
        draft.write_text("half of")
        raise KeyboardInterrupt
    assert list((tmp_path / "new").iterdir()) == []


def test_a_result_that_is_no_json_leaves_no_file(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"auroc": 0.9})
    before = (tmp_path / "result.json").read_text()
    assert before == '{\n "auroc": 0.9\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "result.json", {"auroc": float("nan")}, allow_nan=False)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == before
