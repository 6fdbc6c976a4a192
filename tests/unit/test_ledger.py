"""Storage, commit records and the run directory: whole files, what counts as done, and who owns a directory."""

from __future__ import annotations

import copy
import errno
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from rc_ray.config import Config, load_config
from rc_ray.core import schemas
from rc_ray.errors import DataError, ResumeError
from rc_ray.ledger import rundir, storage
from rc_ray.ledger.ledger import Ledger, chunk_name
from rc_ray.ledger.storage import Folder

TABLE = pa.table({"prompt_id": ["a", "b"], "value": [1, 2]})
HASHES = {"prompts": "1234"}


def config_for(output: Path, *overrides: str) -> Config:
    raw: dict[str, Any] = {
        "model": "some/model",
        "output": str(output),
        "prompts": {"path": "prompts.jsonl"},
        "rewards": {name: {"kind": "classifier", "model": f"some/{name}"} for name in ("helpful", "harmless")},
    }
    return load_config(raw, overrides)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def plain_folder(path: Path) -> Folder:
    return Folder.at(path)


def uri_folder(path: Path) -> Folder:
    """The same place as a URI, which is written as a filesystem that shows a file while it is written: beside its name, then moved."""
    return Folder(f"file://{path}")


@pytest.mark.parametrize("make", [plain_folder, uri_folder])
def test_what_is_written_is_read_back(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path) / "deep" / "er"
    assert folder.is_local == (make is plain_folder)
    assert (folder.exists(), folder.is_empty(), folder.names()) == (False, True, [])
    folder.write_bytes("b.bin", b"\x00\xff")
    folder.write_json("a.json", {"emoji": "😀", "list": [1, None]})
    folder.write_table("t.parquet", TABLE)
    assert folder.read_bytes("b.bin") == b"\x00\xff"
    assert folder.read_json("a.json") == {"emoji": "😀", "list": [1, None]}
    assert folder.read_table("t.parquet") == TABLE
    assert folder.read_table("t.parquet", ["value"]).column_names == ["value"]
    assert folder.names() == ["a.json", "b.bin", "t.parquet"]
    assert folder.names(".json") == ["a.json"]
    assert (folder.exists(), folder.exists("a.json"), folder.exists("c.json"), folder.is_empty()) == (True, True, False, False)
    folder.write_bytes("b.bin", b"shorter")
    assert folder.read_bytes("b.bin") == b"shorter"
    assert set(files_below(tmp_path)) == {"deep/er/a.json", "deep/er/b.bin", "deep/er/t.parquet"}


@pytest.mark.parametrize(
    ("kind", "opened"), [("s3", "deep/a.json"), ("gcs", "deep/a.json"), ("hdfs", r"deep/\.a\.json\.\w+\.tmp")]
)
def test_object_stores_take_a_file_when_it_is_closed(
    kind: str, opened: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, plain = [], Folder.filesystem

    class OfKind:
        type_name = kind

        def __init__(self, filesystem: Any) -> None:
            self._filesystem = filesystem

        def __getattr__(self, name: str) -> Any:
            return getattr(self._filesystem, name)

        def open_output_stream(self, path: str) -> Any:
            places.append(path)
            return self._filesystem.open_output_stream(path)

        def move(self, source: str, target: str) -> None:
            assert kind == "hdfs", "an object store would copy it"
            self._filesystem.move(source, target)

    monkeypatch.setattr(Folder, "filesystem", lambda self: (OfKind(plain(self)[0]), plain(self)[1]))
    folder = uri_folder(tmp_path) / "deep"
    for content in (b"first", b"second"):
        folder.write_bytes("a.json", content)
        assert folder.read_bytes("a.json") == content
    assert folder.create("a.json", b"third") is False
    assert [re.fullmatch(f"{tmp_path}/{opened}", place) is not None for place in places] == [True, True]
    assert files_below(tmp_path) == {"deep/a.json": b"second"}


def test_an_error_of_storage_that_passes_is_waited_for_and_another_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(f"file://{tmp_path}")
    folder.write_bytes("a", b"content")
    waits: list[float] = []
    errors: list[str] = []
    opened = storage._opened

    def failing(uri: str) -> Any:
        if errors:
            raise OSError(errors.pop())
        return opened(uri)

    # Where it is raised is not where it comes from; what matters is the message.
    monkeypatch.setattr(Folder, "filesystem", lambda self: failing(self.uri))
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    errors += [
        "When reading: AWS Error SLOW_DOWN during GetObject operation",
        "curlCode: 28, Timeout was reached",
        "HTTP status 503",
    ]
    assert folder.read_bytes("a") == b"content"
    assert waits == [1.0, 2.0, 4.0]
    errors += ["AWS Error ACCESS_DENIED during GetObject operation"]
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        folder.read_bytes("a")
    assert len(waits) == 3
    errors += ["HTTP status 503"] * 9
    with pytest.raises(OSError, match="503"):
        folder.write_bytes("b", b"")
    assert waits[3:] == list(storage.WAITS_S)


def test_read_all_goes_by_name_and_needs_a_schema_when_nothing_is_there(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "t")
    assert folder.read_all(schemas.DROP) == schemas.DROP.empty_table()
    with pytest.raises(DataError, match="no Parquet file"):
        folder.read_all()
    folder.write_table("2.parquet", TABLE.slice(1))
    folder.write_table("1.parquet", TABLE.slice(0, 1))
    (tmp_path / "t" / "note.txt").write_text("not read")
    assert folder.read_all() == TABLE


def test_folders_are_copied_up_and_down_whole(tmp_path: Path) -> None:
    (tmp_path / "local" / "sub").mkdir(parents=True)
    (tmp_path / "local" / "one").write_bytes(b"1")
    (tmp_path / "local" / "sub" / "two").write_bytes(b"2")
    Folder.at(tmp_path / "far").upload(tmp_path / "local")
    Folder.at(tmp_path / "far").download(tmp_path / "back")
    assert files_below(tmp_path / "back") == {"one": b"1", "sub/two": b"2"}


def test_paths_become_absolute_and_file_uris_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Folder.at("runs/x/").uri == str(tmp_path / "runs" / "x")
    assert Folder.at(f"file://{tmp_path}/runs/x") == Folder.at("runs/x")
    assert Folder.at("s3://bucket/x/").uri == "s3://bucket/x"
    assert (Folder.at("s3://bucket/x") / "pairs").uri == "s3://bucket/x/pairs"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Folder.at("~/x").uri == str(tmp_path / "home" / "x")


def test_a_uri_of_an_unknown_kind_is_named() -> None:
    with pytest.raises(DataError, match=r"s4://bucket/x.*use a local path"):
        Folder.at("s4://bucket/x").is_empty()


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder.at(tmp_path / "f")
    folder.write_bytes("kept.json", b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, failing, full)
    for name in ("kept.json", "new.json"):
        with pytest.raises(OSError, match="no space left") as error:
            folder.write_bytes(name, b"new content")
        assert error.value.filename == str(tmp_path / "f" / name)
    assert files_below(tmp_path) == {"f/kept.json": b"old"}


def test_the_name_is_only_taken_once_the_content_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder.at(tmp_path)
    seen: list[tuple[bool, list[int]]] = []
    sync = os.fsync

    def look(descriptor: int) -> None:
        seen.append(((tmp_path / "x.parquet").exists(), [p.stat().st_size for p in tmp_path.iterdir()]))
        assert folder.names(".parquet") == []
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    folder.write_bytes("x.parquet", b"12345")
    assert seen == [(False, [5])]
    assert folder.names(".parquet") == ["x.parquet"]


def test_only_chunks_with_a_record_are_done(tmp_path: Path) -> None:
    ledger, data = Ledger(Folder.at(tmp_path / "ledger")), Folder.at(tmp_path / "groups")
    assert ledger.done("sample") == set()
    data.write_table(f"{chunk_name(7)}.parquet", TABLE)
    assert ledger.done("sample") == set()
    for chunk in (0, 12, 1_000_000):
        ledger.commit("sample", chunk, {"rows": 2}, {data: TABLE})
    ledger.finish("sample", {"rows": 6})
    assert ledger.done("sample") == {0, 12, 1_000_000}
    assert ledger.done("score") == set()
    assert data.read_table("chunk-000012.parquet") == TABLE


def test_an_empty_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "score").mkdir()
    (tmp_path / "score" / f"{chunk_name(3)}.json").touch()
    (tmp_path / "score" / "finished.json").touch()
    ledger = Ledger(Folder.at(tmp_path))
    assert (ledger.done("score"), ledger.has("score", 3), ledger.is_finished("score")) == (set(), False, False)
    assert ledger.totals("score") == {}
    assert Folder.at(tmp_path / "score").is_empty()
    (tmp_path / "manifest.json").touch()
    config = config_for(tmp_path / "score")
    assert rundir.create(config, HASHES).manifest()["fingerprint"] == rundir.fingerprint(config)


def test_the_record_comes_after_all_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(Folder.at(tmp_path / "ledger"))
    pairs, drops = Folder.at(tmp_path / "pairs"), Folder.at(tmp_path / "drops")
    write = Folder.write_table

    def fails_for_drops(self: Folder, name: str, table: pa.Table) -> None:
        if self == drops:
            raise OSError("disk full")
        write(self, name, table)

    monkeypatch.setattr(Folder, "write_table", fails_for_drops)
    with pytest.raises(OSError, match="disk full"):
        ledger.commit("select", 0, {"paired": 2}, {pairs: TABLE, drops: TABLE})
    assert ledger.done("select") == set()
    monkeypatch.undo()
    ledger.commit("select", 0, {"paired": 2}, {pairs: TABLE, drops: TABLE})
    assert ledger.done("select") == {0}


def test_committing_a_chunk_again_replaces_it(tmp_path: Path) -> None:
    ledger, data = Ledger(Folder.at(tmp_path / "ledger")), Folder.at(tmp_path / "groups")
    for _ in range(2):
        ledger.commit("sample", 3, {"tokens": 5}, {data: TABLE})
    assert ledger.done("sample") == {3}
    assert ledger.totals("sample") == {"tokens": 5}
    assert data.read_all() == TABLE


def test_totals_add_up_over_chunks_and_leave_the_facts_out(tmp_path: Path) -> None:
    ledger = Ledger(Folder.at(tmp_path))
    assert ledger.totals("sample") == {}
    ledger.commit("sample", 0, {"tokens": 10, "seconds": 0.5}, {})
    ledger.commit("sample", 1, {"tokens": 5, "failed": 1}, {})
    ledger.finish("sample", {"tokens": 1000})
    assert ledger.totals("sample") == {"tokens": 15, "seconds": 0.5, "failed": 1}


def test_finish_marks_a_stage_and_keeps_its_facts(tmp_path: Path) -> None:
    ledger = Ledger(Folder.at(tmp_path))
    ledger.commit("train", 0, {}, {})
    assert not ledger.is_finished("train")
    ledger.finish("train", {"steps": 3, "loss": [0.7, 0.6]})
    assert ledger.is_finished("train")
    assert not ledger.is_finished("evaluate")
    assert ledger.facts("train") == {"steps": 3, "loss": [0.7, 0.6]}


def test_a_directory_belongs_to_its_configuration(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run")
    assert rundir.check_owner(config, HASHES) is False
    assert not (tmp_path / "run").exists()
    run = rundir.create(config, HASHES)
    assert rundir.check_owner(config, HASHES) is True
    assert run.config() == config
    manifest = run.manifest()
    assert (manifest["data_hashes"], manifest["seed"]) == (HASHES, 0)
    assert {"python", "rc-ray", "ray", "torch"} <= manifest["versions"].keys()


def test_an_option_added_since_the_run_began_counts_with_its_default(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run")
    run = rundir.create(config, HASHES)
    recorded, plain = run.manifest()["result_fields"], yaml.safe_load(run.root.read_bytes("config.yaml"))
    older = copy.deepcopy(recorded)
    for fields in (older, plain):
        del fields["generation"]["target_gap"], fields["rewards"]["helpful"]["label"]
    older["generation"]["engine"] = {"max_num_seqs": 4}  # counted then
    run.root.write_bytes("config.yaml", yaml.safe_dump(plain).encode())
    run.update_manifest(result_fields=older, fingerprint="of an older version")
    assert run.result_fields() == recorded
    assert rundir.check_owner(config, HASHES)
    with pytest.raises(ResumeError) as caught:
        rundir.check_owner(config_for(tmp_path / "run", "generation.top_p=0.5", "rewards.helpful.label=1"), HASHES)
    lines = str(caught.value).splitlines()[1:-1]
    assert lines == ["  generation.top_p: 1.0 -> 0.5", "  rewards.helpful.label: None -> 1"]
    run.root.remove("config.yaml")  # a kill came before it
    assert run.result_fields() == older


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    assert rundir.check_owner(config_for(tmp_path), HASHES) is False


def test_creating_again_keeps_what_is_recorded(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run")
    rundir.create(config, HASHES).update_manifest(scale={"helpful": 2.0})
    before = files_below(tmp_path)
    run = rundir.create(config, HASHES)
    assert files_below(tmp_path) == before
    assert run.manifest()["scale"] == {"helpful": 2.0}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["seed=3"], "seed: 0 -> 3"),
        (["generation.num_candidates=4"], "generation.num_candidates: 8 -> 4"),
        (["rewards.helpful.model=other/model"], "rewards.helpful.model: 'some/helpful' -> 'other/model'"),
        (["rewards.third={kind: classifier, model: m}"], "rewards.third: '(absent)' ->"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(overrides: list[str], line: str, tmp_path: Path) -> None:
    rundir.create(config_for(tmp_path), HASHES)
    before = files_below(tmp_path)
    for open_directory in (rundir.check_owner, rundir.create):
        with pytest.raises(ResumeError) as caught:
            open_directory(config_for(tmp_path, *overrides), HASHES)
        assert line in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert "another `output`" in str(caught.value)
    assert files_below(tmp_path) == before


def test_other_data_are_refused_with_both_hashes(tmp_path: Path) -> None:
    rundir.create(config_for(tmp_path), HASHES)
    with pytest.raises(ResumeError, match="content of prompts: 1234 -> 5678"):
        rundir.check_owner(config_for(tmp_path), {"prompts": "5678"})


def test_a_change_of_deployment_only_is_accepted(tmp_path: Path) -> None:
    rundir.create(config_for(tmp_path), HASHES)
    moved = [
        "generation.pool.size=4",
        "cluster.chunk_size=3",
        "training.per_device_batch_size=4",
        "rewards.helpful.pool.size=2",
    ]
    assert rundir.check_owner(config_for(tmp_path, *moved), HASHES) is True


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for open_directory in (rundir.check_owner, rundir.create):
        with pytest.raises(ResumeError, match=r"not empty and is no run directory.*new or empty folder"):
            open_directory(config_for(tmp_path), HASHES)
    assert files_below(tmp_path) == {"thesis.txt": b"years of work"}


def test_only_a_run_directory_can_be_opened(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=r"is not a run directory.*rc-ray run CONFIG"):
            rundir.open_existing(str(place))
    rundir.create(config_for(tmp_path / "run"), HASHES)
    assert rundir.open_existing(str(tmp_path / "run")).config() == config_for(tmp_path / "run")


def test_options_of_a_filesystem_stay_at_the_end_of_a_uri() -> None:
    from rc_ray.pipeline.rounds import round_config
    from rc_ray.pipeline.run import RunResult

    query = "?scheme=http&endpoint_override=minio:9000"
    folder = Folder.at(f"s3://bucket/run/{query}")
    assert (folder / "pairs").uri == f"s3://bucket/run/pairs{query}"
    assert folder.beside("-pilot").uri == f"s3://bucket/run-pilot{query}"
    assert RunResult(folder.uri, {}).model == f"s3://bucket/run/model{query}"
    config = config_for(Path("unused")).model_copy(update={"output": folder.uri})
    assert round_config(config, 2, None).output == f"s3://bucket/run/round-2{query}"
    assert Folder.at("/odd?name/").beside(".x").uri == "/odd?name.x"


def test_a_password_in_a_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(DataError, match=r"the URI of bucket/run on s3 holds a password.*environment") as refused:
        Folder.at("s3://AKIA:hunter2@bucket/run?region=eu")
    assert "hunter2" not in str(refused.value)
    assert "AKIA" not in str(refused.value)
    with pytest.raises(DataError, match="holds a client_secret") as refused:
        Folder.at("abfss://container@account.host/run?client_secret=hunter2")
    assert "hunter2" not in str(refused.value)
    assert Folder.at("abfss://container@account.host/run").uri == "abfss://container@account.host/run"


def test_a_directory_that_was_moved_is_its_own_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rundir.create(config_for(Path("runs/first")), HASHES)
    (tmp_path / "runs" / "first").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    assert rundir.open_existing(str(tmp_path / "moved")).config().output == str(tmp_path / "moved")


def test_a_write_that_is_cut_leaves_the_older_file_where_files_show_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on HDFS and Azure."""
    import pyarrow.fs as pafs

    class Cut:
        type_name = "hdfs"

        def open_output_stream(self, path: str) -> Any:
            Path(path).write_bytes(b"")
            raise OSError("killed")

        def __getattr__(self, name: str) -> Any:
            return getattr(pafs.LocalFileSystem(), name)

    folder = uri_folder(tmp_path)
    folder.write_bytes("a.json", b"old")
    with monkeypatch.context() as patched:
        patched.setattr(Folder, "filesystem", lambda self: (Cut(), str(tmp_path)))
        with pytest.raises(OSError, match="killed"):
            folder.write_bytes("a.json", b"new")
    assert folder.read_bytes("a.json") == b"old"
    folder.write_bytes("a.json", b"new")
    assert folder.read_bytes("a.json") == b"new"
    assert folder.names(".json") == ["a.json"]
