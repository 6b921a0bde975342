"""Every kind of source is detected, and all of them yield the same images, captions and classes."""

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from of_config import images_of, indexed
from PIL import Image

from ldm.config import loader
from ldm.config.schema import BucketConfig, SourceConfig
from ldm.data.index import Index
from ldm.data.index_report import stop_reason
from ldm.data.records import BadSample
from ldm.data.source_kinds import check, detect
from ldm.data.sources import Sources
from ldm.utils.errors import UserError

CAPTIONS = {"a.png": ["a red hat"], "b.jpg": ["two shoes", "a pair of shoes"], "c.webp": ["ein grüner Schal"]}


@pytest.fixture
def images(tmp_path: Path) -> dict[str, bytes]:
    """Encoded images by name."""
    rng, encoded = np.random.default_rng(0), {}
    for name, kind in (("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.webp", "WEBP")):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (24, 30, 3), np.uint8)).save(buffer, kind)
        encoded[name] = buffer.getvalue()
    return encoded


def write_images(folder: Path, images: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (folder / name).write_bytes(data)
    return folder


def write_jsonl(folder: Path, images: dict[str, bytes]) -> str:
    rows = [{"file_name": name, "text": text} for name, text in CAPTIONS.items()]
    (write_images(folder, images) / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def write_csv(folder: Path, images: dict[str, bytes]) -> str:
    with (write_images(folder, images) / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerows([("file_name", "text"), *((name, "\n".join(text)) for name, text in CAPTIONS.items())])
    return f"{{path: {folder}, lines: true}}"


def write_metadata_parquet(folder: Path, images: dict[str, bytes]) -> str:
    table = pa.table({"file_name": list(CAPTIONS), "text": list(CAPTIONS.values())})
    pq.write_table(table, write_images(folder, images) / "metadata.parquet")
    return str(folder)


def write_sidecars(folder: Path, images: dict[str, bytes]) -> str:
    for name, text in CAPTIONS.items():
        (write_images(folder, images) / name).with_suffix(".txt").write_text("\n".join(text), "utf-8")
    (folder / "a.txt").rename(folder / "a.caption")
    return f"{{path: {folder}, lines: true}}"


def write_tar(folder: Path, images: dict[str, bytes]) -> str:
    folder.mkdir(parents=True)
    for shard, names in enumerate((["a.png", "b.jpg"], ["c.webp"])):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for name in names:
                metadata = json.dumps({"text": CAPTIONS[name]}).encode()
                for member, data in ((name, images[name]), (Path(name).stem + ".json", metadata)):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / "s-{0..1}.tar")


def write_url(folder: Path, images: dict[str, bytes]) -> str:
    return "file://" + write_tar(folder, images)


def dataset_of(images: dict[str, bytes]) -> datasets.Dataset:
    rows = [{"bytes": data, "path": None} for data in images.values()]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    return datasets.Dataset.from_dict({"image": rows, "text": list(CAPTIONS.values())}, features)


def write_parquet(folder: Path, images: dict[str, bytes]) -> str:
    folder.mkdir(parents=True)
    dataset_of(images).to_parquet(folder / "train.parquet")
    return str(folder)


def write_plain_parquet(folder: Path, images: dict[str, bytes]) -> str:
    folder.mkdir(parents=True)
    table = pa.table({"image": list(images.values()), "text": list(CAPTIONS.values())})
    pq.write_table(table, folder / "train.parquet")
    return str(folder / "train.parquet")


def write_saved(folder: Path, images: dict[str, bytes]) -> str:
    dataset_of(images).save_to_disk(folder)
    return str(folder)


# Each writer takes a folder and the encoded images, and returns what `data.source` is set to.
KINDS: dict[str, Callable[[Path, dict[str, bytes]], str]] = {
    "jsonl": write_jsonl,
    "csv": write_csv,
    "metadata parquet": write_metadata_parquet,
    "sidecars": write_sidecars,
    "tar": write_tar,
    "url": write_url,
    "parquet": write_parquet,
    "plain parquet": write_plain_parquet,
    "datasets": write_saved,
}
DETECTED = {"jsonl": "metadata", "csv": "metadata", "metadata parquet": "metadata", "url": "tar"}
DETECTED |= {"plain parquet": "parquet"}


def settings(root: Path, folder: Path, source: str, *overrides: str) -> loader.Config:
    return loader.load(
        root / "configs/tiny.yaml", [f"run.dir={folder}", f"data.source={source}", "data.size=16", *overrides]
    )


def entries_by_hash(index: Index) -> dict[bytes, tuple[tuple[str, ...], int, int]]:
    return {entry.sha256: (entry.captions, entry.width, entry.height) for entry in index}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_yields_the_same_tensors_and_captions(
    kind: str, root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    reference = indexed(settings(root, tmp_path / "a", write_jsonl(tmp_path / "reference", images)))
    config = settings(root, tmp_path / "b", KINDS[kind](tmp_path / "data", images))
    index = indexed(config)
    assert index.bad_count() == 0
    assert index.sources.kinds == [DETECTED.get(kind, kind)]
    assert entries_by_hash(index) == entries_by_hash(reference)
    positions = {entry.sha256: i for i, entry in enumerate(index)}
    for i, entry in enumerate(reference):
        image = images_of(index, config, 1).plan.index.load_image(positions[entry.sha256])
        assert image.tobytes() == reference.load_image(i).tobytes()
    pixels = {bytes(images_of(index, config, 1)[n]["pixels"].numpy().tobytes()) for n in range(3)}
    assert pixels == {images_of(reference, config, 1)[n]["pixels"].numpy().tobytes() for n in range(3)}


def test_class_folders_yield_labels_and_captions_by_template(
    root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    write_images(tmp_path / "data/rain_coat", {"001.png": images["a.png"]})
    write_images(tmp_path / "data/hat/summer", {"001.jpg": images["b.jpg"]})
    config = settings(root, tmp_path / "run", f"{{path: {tmp_path / 'data'}, template: 'a photo of a {{}}'}}")
    index = indexed(config)
    assert index.sources.kinds == ["classes"]
    assert {(entry.captions, entry.label) for entry in index} == {
        (("a photo of a rain coat",), "rain_coat"),
        (("a photo of a hat",), "hat"),
    }
    assert index.labels() == ["hat", "rain_coat"]
    samples = images_of(index, config, 1)
    assert {int(samples[n]["class"]) for n in range(2)} == {0, 1}


UNCONDITIONAL = ("stage2.conditions=[]", "stage2.pooled_text=false")


def write_uncaptioned_jsonl(folder: Path, images: dict[str, bytes]) -> str:
    (write_images(folder, images) / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{name}"}}\n' for name in images)
    )
    return str(folder)


def write_uncaptioned_csv(folder: Path, images: dict[str, bytes]) -> str:
    (write_images(folder, images) / "metadata.csv").write_text("\n".join(["file_name", *images]))
    return str(folder)


def write_uncaptioned_metadata_parquet(folder: Path, images: dict[str, bytes]) -> str:
    pq.write_table(pa.table({"file_name": list(images)}), write_images(folder, images) / "metadata.parquet")
    return str(folder)


def write_uncaptioned_folder(folder: Path, images: dict[str, bytes]) -> str:
    write_images(folder / "deep/deeper", {"c.webp": images["c.webp"]})
    return str(write_images(folder, {name: images[name] for name in ("a.png", "b.jpg")}))


def write_uncaptioned_classes(folder: Path, images: dict[str, bytes]) -> str:
    for name, data in images.items():
        write_images(folder / "_", {name: data})  # a name that yields no caption
    return str(folder)


def write_uncaptioned_tar(folder: Path, images: dict[str, bytes]) -> str:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in sorted({**images, "b.json": b"{}", "c.json": b"[]"}.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(folder)


def write_uncaptioned_parquet(folder: Path, images: dict[str, bytes]) -> str:
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"image": list(images.values())}), folder / "train.parquet")
    return str(folder)


def write_uncaptioned_saved(folder: Path, images: dict[str, bytes]) -> str:
    dataset_of(images).remove_columns("text").save_to_disk(folder)
    return str(folder)


def write_uncaptioned_kohya(folder: Path, images: dict[str, bytes]) -> str:
    write_images(folder / "images", images)
    (folder / "set.toml").write_text("[[datasets]]\nresolution = 16\n[[datasets.subsets]]\nimage_dir = 'images'\n")
    return str(folder / "set.toml")


UNCAPTIONED: dict[str, tuple[str, Callable[[Path, dict[str, bytes]], str]]] = {
    "jsonl": ("metadata", write_uncaptioned_jsonl),
    "csv": ("metadata", write_uncaptioned_csv),
    "metadata parquet": ("metadata", write_uncaptioned_metadata_parquet),
    "folder": ("images", write_uncaptioned_folder),
    "classes": ("classes", write_uncaptioned_classes),
    "tar": ("tar", write_uncaptioned_tar),
    "parquet": ("parquet", write_uncaptioned_parquet),
    "datasets": ("datasets", write_uncaptioned_saved),
    "kohya": ("kohya", write_uncaptioned_kohya),
}


@pytest.mark.parametrize("kind", UNCAPTIONED)
def test_no_kind_needs_captions_where_the_model_is_not_conditioned_on_text(
    kind: str, root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    detected, write_source = UNCAPTIONED[kind]
    config = settings(root, tmp_path / "run", write_source(tmp_path / "data", images), *UNCONDITIONAL)
    index = indexed(config)
    assert index.sources.kinds == [detected]
    assert index.bad_count() == 0
    assert {entry.sha256: entry.captions for entry in index} == {
        hashlib.sha256(data).digest(): ("",) for data in images.values()
    }
    assert {images_of(index, config, 1)[n]["caption"] for n in range(3)} == {""}


@pytest.mark.parametrize("kind", KINDS)
def test_present_captions_are_kept_where_none_are_needed(
    kind: str, root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    source = KINDS[kind](tmp_path / "data", images)
    with_text = indexed(settings(root, tmp_path / "run", source))
    assert entries_by_hash(indexed(settings(root, tmp_path / "run", source, *UNCONDITIONAL))) == entries_by_hash(
        with_text
    )


def test_some_captions_may_be_missing_where_none_are_needed(
    root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    folder = write_images(tmp_path / "data", images)
    (folder / "a.txt").write_text("a red hat")
    (folder / "b.txt").write_text(" \n")
    index = indexed(settings(root, tmp_path / "run", str(folder), *UNCONDITIONAL))
    assert (index.sources.kinds, index.bad_count()) == (["sidecars"], 0)
    assert {entry.key: entry.captions for entry in index} == {"a.png": ("a red hat",), "b.jpg": ("",), "c.webp": ("",)}


@pytest.mark.parametrize("text", [" ", [], ["", " "], None])
def test_an_empty_caption_counts_as_missing(text: object, root: Path, tmp_path: Path, images: dict[str, bytes]) -> None:
    (write_images(tmp_path / "data", images) / "metadata.jsonl").write_text(
        json.dumps({"file_name": "a.png", "text": text})
    )
    source = str(tmp_path / "data")
    (entry,) = indexed(settings(root, tmp_path / "run", source, *UNCONDITIONAL))
    assert entry.captions == ("",)
    assert indexed(settings(root, tmp_path / "run", source)).bad_count() == 1


def test_an_unreadable_caption_is_bad_even_where_none_is_needed(
    root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    folder = write_images(tmp_path / "data", images)
    (folder / "a.txt").write_bytes("grün".encode("latin-1"))
    index = indexed(settings(root, tmp_path / "run", str(folder), *UNCONDITIONAL))
    assert [(bad.key, bad.fix) for bad in index.bad_samples()] == [("a.png", "save it as UTF-8")]


def test_folders_of_images_are_classes_unless_the_kind_is_images(
    root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    write_images(tmp_path / "data/hats", {"a.png": images["a.png"]})
    for kind in ("classes", "images"):
        source = str(tmp_path / "data") if kind == "classes" else f"{{path: {tmp_path / 'data'}, kind: images}}"
        (entry,) = (index := indexed(settings(root, tmp_path / "run", source, *UNCONDITIONAL)))
        assert index.sources.kinds == [kind]
        assert entry.captions == (("hats",) if kind == "classes" else ("",))


def test_kind_images_is_refused_where_captions_are_needed(root: Path, tmp_path: Path, images: dict[str, bytes]) -> None:
    config = settings(
        root, tmp_path / "run", f"{{path: {write_uncaptioned_folder(tmp_path / 'data', images)}, kind: images}}"
    )
    with pytest.raises(UserError) as caught:
        indexed(config)
    assert str(caught.value) == (
        f"data.source.kind: images, so {tmp_path / 'data'} has no captions, and stage2.conditions has text; "
        "leave out the kind, or text"
    )
    with pytest.raises(UserError, match="no folder"):
        check([SourceConfig(path=str(tmp_path / "gone"), kind="images")], conditions=())


def test_an_index_built_without_captions_is_never_used_where_they_are_needed(
    root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    folder = write_images(tmp_path / "data", images)
    (folder / "a.txt").write_text("a red hat")
    run = tmp_path / "run"
    for conditions, bad in ((UNCONDITIONAL, 0), ((), 2), (UNCONDITIONAL, 0)):
        assert indexed(settings(root, run, str(folder), *conditions)).bad_count() == bad
    assert len(list((run / "cache").glob("index-*.arrow"))) == 2


def test_the_name_of_an_index_with_captions_never_changes(root: Path, tmp_path: Path, images: dict[str, bytes]) -> None:
    source = write_jsonl(tmp_path / "data", images)
    indexed(settings(root, tmp_path / "run", source))
    fields = {
        "path": source,
        "kind": "auto",
        "caption_column": "text",
        "image": "image",
        "lines": False,
        "template": "{}",
        "split": "train",
        "at": source,
    }
    name = hashlib.sha256(json.dumps([[fields], "white", 8, 16]).encode()).hexdigest()[:12]
    assert [path.name for path in (tmp_path / "run/cache").glob("index-*")] == [f"index-{name}.arrow"]


CLASS_CONDITIONAL = ("stage2.conditions=[class]", "stage2.pooled_text=false")
LABELS = {"a.png": "hat", "b.jpg": "shoe", "c.webp": "hat"}


def write_labelled_jsonl(folder: Path, images: dict[str, bytes]) -> str:
    rows = (json.dumps({"file_name": name, "kind": label}) for name, label in LABELS.items())
    (write_images(folder, images) / "metadata.jsonl").write_text("\n".join(rows))
    return str(folder)


def write_labelled_csv(folder: Path, images: dict[str, bytes]) -> str:
    rows = (f"{name}, {label} " for name, label in LABELS.items())
    (write_images(folder, images) / "metadata.csv").write_text("\n".join(["file_name,kind", *rows]))
    return str(folder)


def write_labelled_metadata_parquet(folder: Path, images: dict[str, bytes]) -> str:
    table = pa.table({"file_name": list(LABELS), "kind": pa.array(LABELS.values()).dictionary_encode()})
    pq.write_table(table, write_images(folder, images) / "metadata.parquet")
    return str(folder)


def write_labelled_folders(folder: Path, images: dict[str, bytes]) -> str:
    for name, label in LABELS.items():
        write_images(folder / label / "deeper", {name: images[name]})
    return str(folder)


def write_labelled_tar(folder: Path, images: dict[str, bytes]) -> str:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, label in LABELS.items():
            stem = Path(name).stem
            metadata = json.dumps({"kind": label}).encode()
            files = {name: images[name], f"{stem}.json": metadata} | ({"a.txt": b"a red hat"} if stem == "a" else {})
            for member, data in files.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(folder)


def labelled_dataset(images: dict[str, bytes], kind: object) -> datasets.Dataset:
    rows = [{"bytes": data, "path": None} for data in images.values()]
    features = datasets.Features({"image": datasets.Image(), "kind": kind})
    names = ["shoe", "hat"]
    labels = [names.index(label) if isinstance(kind, datasets.ClassLabel) else label for label in LABELS.values()]
    return datasets.Dataset.from_dict({"image": rows, "kind": labels}, features)


def write_labelled_parquet(folder: Path, images: dict[str, bytes]) -> str:
    folder.mkdir(parents=True)
    labelled_dataset(images, datasets.Value("string")).to_parquet(folder / "train.parquet")
    return str(folder)


def write_parquet_with_class_names(folder: Path, images: dict[str, bytes]) -> str:
    folder.mkdir(parents=True)
    labelled_dataset(images, datasets.ClassLabel(names=["shoe", "hat"])).to_parquet(folder / "train.parquet")
    return str(folder)


def write_labelled_saved(folder: Path, images: dict[str, bytes]) -> str:
    labelled_dataset(images, datasets.ClassLabel(names=["shoe", "hat"])).save_to_disk(folder)
    return str(folder)


def write_labelled_kohya(folder: Path, images: dict[str, bytes]) -> str:
    subsets = ""
    for name, label in LABELS.items():
        write_images(folder / Path(name).stem, {name: images[name]})
        subsets += f"[[datasets.subsets]]\nimage_dir = '{Path(name).stem}'\nclass_tokens = '{label}'\n"
    (folder / "set.toml").write_text(f"[[datasets]]\nresolution = 16\n{subsets}")
    return str(folder / "set.toml")


LABELLED: dict[str, Callable[[Path, dict[str, bytes]], str]] = {
    "jsonl": write_labelled_jsonl,
    "csv": write_labelled_csv,
    "metadata parquet": write_labelled_metadata_parquet,
    "folders": write_labelled_folders,
    "tar": write_labelled_tar,
    "parquet": write_labelled_parquet,
    "parquet with names": write_parquet_with_class_names,
    "datasets": write_labelled_saved,
    "kohya": write_labelled_kohya,
}


@pytest.mark.parametrize("kind", LABELLED)
def test_every_kind_yields_the_same_classes(kind: str, root: Path, tmp_path: Path, images: dict[str, bytes]) -> None:
    source = LABELLED[kind](tmp_path / "data", images)
    column = "" if kind in ("folders", "kohya") else ", label: kind"
    config = settings(root, tmp_path / "run", f"{{path: {source}{column}}}", *CLASS_CONDITIONAL)
    index = indexed(config)
    assert index.bad_count() == 0
    assert {entry.sha256: entry.label for entry in index} == {
        hashlib.sha256(images[name]).digest(): label for name, label in LABELS.items()
    }
    assert index.labels() == ["hat", "shoe"]
    samples = images_of(index, config, 1)
    numbers = {samples.plan[n].entry.sha256: int(samples[n]["class"]) for n in range(3)}
    assert numbers == {hashlib.sha256(images[name]).digest(): int(LABELS[name] == "shoe") for name in LABELS}


def test_the_first_folder_is_the_class_also_where_there_are_caption_files(
    root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    (write_images(tmp_path / "data/hats/red", {"a.png": images["a.png"]}) / "a.txt").write_text("a red hat")
    (write_images(tmp_path / "data", {"b.jpg": images["b.jpg"]}) / "b.txt").write_text("two shoes")
    index = indexed(settings(root, tmp_path / "run", str(tmp_path / "data"), "stage2.conditions=[text,class]"))
    assert [(entry.captions, entry.label) for entry in index] == [(("a red hat",), "hats")]
    assert [(bad.key, bad.reason) for bad in index.bad_samples()] == [("b.jpg", "it has no class")]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (7, "7"),
        (0, "0"),
        ("a  hat\n", "a hat"),
        (None, "it has no class"),
        (" ", "it has no class"),
        (True, "its class is true"),
        (1.5, "its class is 1.5"),
        (["hat"], 'its class is ["hat"]'),
        ("\ud800", "the class is not UTF-8"),
        ("a\0", "the class has NULs in it"),
    ],
)
def test_a_class_is_a_string_or_an_integer(
    label: object, expected: str, root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    (write_images(tmp_path / "data", images) / "metadata.jsonl").write_text(
        json.dumps({"file_name": "a.png", "label": label})
    )
    index = indexed(settings(root, tmp_path / "run", str(tmp_path / "data"), *CLASS_CONDITIONAL))
    assert [*(entry.label for entry in index), *(bad.reason for bad in index.bad_samples())] == [expected]
    assert index.labels() == ([] if index.bad_count() else [expected])


def test_a_class_number_without_a_name_is_bad_and_minus_one_is_no_class(
    root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    (tmp_path / "data").mkdir()
    named = labelled_dataset(images, datasets.ClassLabel(names=["shoe", "hat"])).data.table
    table = named.set_column(1, "kind", pa.array([-1, 1, 2])).replace_schema_metadata(named.schema.metadata)
    pq.write_table(table, tmp_path / "data/train.parquet")
    source = f"{{path: {tmp_path / 'data'}, label: kind}}"
    index = indexed(settings(root, tmp_path / "run", source, *CLASS_CONDITIONAL))
    assert [entry.label for entry in index] == ["hat"]
    assert [bad.reason for bad in index.bad_samples()] == ["it has no class", "its class is 2, and only 2 have names"]


def test_an_image_without_a_class_is_bad_only_where_classes_are_needed(
    root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    source = write_uncaptioned_jsonl(tmp_path / "data", images)
    assert indexed(settings(root, tmp_path / "run", source, *UNCONDITIONAL)).bad_count() == 0
    index = indexed(settings(root, tmp_path / "run", source, *CLASS_CONDITIONAL))
    assert len(index) == 0
    assert stop_reason(index, tmp_path / "data-report.json") == (
        f"data.source: no usable image in {source}; the first bad one: "
        "a.png: it has no class; write it into the column 'label', or put it in a class folder"
    )
    kohya = indexed(
        settings(root, tmp_path / "other", write_uncaptioned_kohya(tmp_path / "set", images), *CLASS_CONDITIONAL)
    )
    assert {bad.fix for bad in kohya.bad_samples()} == {"give its subset class_tokens"}


def test_a_folder_with_only_bad_images_is_no_class(root: Path, tmp_path: Path, images: dict[str, bytes]) -> None:
    source = write_labelled_folders(tmp_path / "data", images)
    write_images(tmp_path / "data/coat", {"d.png": b"damaged"})
    index = indexed(settings(root, tmp_path / "run", source, *CLASS_CONDITIONAL))
    assert (index.labels(), index.bad_count()) == (["hat", "shoe"], 1)


def test_classes_are_part_of_the_fingerprint_only_where_they_are_learned(
    root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    source = f"{{path: {write_labelled_jsonl(tmp_path / 'data', images)}, label: kind}}"
    metadata = tmp_path / "data/metadata.jsonl"

    def fingerprints(*overrides: str) -> list[str]:
        built = indexed(settings(root, tmp_path / "run", source, *overrides))
        return [built.fingerprint(), built.first(1).fingerprint()]

    before, without = fingerprints(*CLASS_CONDITIONAL), fingerprints(*UNCONDITIONAL)
    metadata.write_text(metadata.read_text().replace("shoe", "boot"))  # the first image stays a hat
    after = fingerprints(*CLASS_CONDITIONAL)
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert fingerprints(*UNCONDITIONAL) == without


def test_a_label_column_changes_nothing_where_no_classes_are_learned(
    root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    folder = tmp_path / "data"
    plain = indexed(settings(root, tmp_path / "plain", write_jsonl(folder, images)))
    rows = [{"file_name": name, "text": text, "label": [7]} for name, text in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labelled = indexed(settings(root, tmp_path / "labelled", f"{{path: {folder}, label: label}}"))
    assert labelled.fingerprint() == plain.fingerprint()
    plain_file, labelled_file = (next((tmp_path / run / "cache").glob("index-*")) for run in ("plain", "labelled"))
    assert (plain_file.name, plain_file.read_bytes()) == (labelled_file.name, labelled_file.read_bytes())


def test_an_index_is_shared_only_by_runs_that_need_the_same_columns(
    root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    source = write_jsonl(tmp_path / "data", images)
    for label in ("label", "kind"):
        for conditions in ("[]", "[text]", "[class]", "[text,class]"):
            overrides = (f"stage2.conditions={conditions}", "stage2.pooled_text=false")
            indexed(settings(root, tmp_path / "run", f"{{path: {source}, label: {label}}}", *overrides))
    assert len(list((tmp_path / "run/cache").glob("index-*.arrow"))) == 2 + 2 * 2


def test_sources_are_mixed_by_repeats_and_by_weights(root: Path, tmp_path: Path, images: dict[str, bytes]) -> None:
    write_jsonl(tmp_path / "first", images)
    write_sidecars(tmp_path / "second", images)
    for mix, expected in (
        (f"[{tmp_path / 'first'}, {{path: {tmp_path / 'second'}, repeats: 3}}]", 0.75),
        (f"[{{path: {tmp_path / 'first'}, weight: 1}}, {{path: {tmp_path / 'second'}, weight: 4}}]", 0.8),
    ):
        config = settings(root, tmp_path / "run", mix)
        index = indexed(config)
        assert len(index) == 6
        plan = images_of(index, config, 1).plan
        share = np.mean([plan.index[plan[n].number].key.startswith("1:") for n in range(300)])
        assert share == pytest.approx(expected, abs=0.02)


KOHYA = """
[general]
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
[[datasets]]
resolution = 16
enable_bucket = true
bucket_reso_steps = 8
min_bucket_reso = 8
max_bucket_reso = 32
bucket_no_upscale = true
  [[datasets.subsets]]
  image_dir = "hats"
  num_repeats = 2
  flip_aug = true
  caption_dropout_rate = 0.5
  [[datasets.subsets]]
  image_dir = "scarves"
  class_tokens = "a scarf"
"""


def test_a_kohya_toml_is_read_with_its_settings(root: Path, tmp_path: Path, images: dict[str, bytes]) -> None:
    write_images(tmp_path / "hats", {"a.png": images["a.png"]})
    (tmp_path / "hats/a.txt").write_text("hat, red, wool")
    write_images(tmp_path / "scarves", {"c.webp": images["c.webp"]})
    (tmp_path / "set.toml").write_text(KOHYA)
    config = settings(root, tmp_path / "run", str(tmp_path / "set.toml"))
    assert config.data.buckets == BucketConfig(step=8, smallest=8, largest=32, upscale=False)
    hat, scarf = indexed(config)
    assert set(hat.captions) == {"hat, red, wool", "hat, wool, red"}
    assert (hat.repeats, hat.flip, hat.dropout) == (2, True, 0.5)
    assert (scarf.captions, scarf.repeats, scarf.flip, scarf.dropout) == (("a scarf",), 1, None, None)
    with pytest.raises(UserError, match=r"data\.size: 32, but .*set\.toml says 16"):
        settings(root, tmp_path / "run", str(tmp_path / "set.toml"), "data.size=32")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("num_repeat = 2", "'num_repeat' is unknown or has no meaning here; the nearest is 'num_repeats'"),
        ("batch_size = 4", "batch_size has no meaning here; set stage2.batch"),
        ("flip_aug = 1", "flip_aug: 1; give bool"),
        ("caption_dropout_rate = 1.5", "caption_dropout_rate: 1.5; give less than 1"),
        ("num_repeats = 0", "num_repeats: 0; give 1 or more"),
    ],
)
def test_an_unsupported_key_of_a_kohya_toml_is_an_error(line: str, expected: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text(f"[general]\n{line}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'x'\n")
    with pytest.raises(UserError) as caught:
        settings(root, tmp_path / "run", str(tmp_path / "set.toml"))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"file_name": "../x.png", "text": "x"}', "leads out of the folder"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "leads out of the folder"),
        ('{"file_name": "link.png", "text": "x"}', "leads out of the folder"),
        ('{"file_name": "gone.png", "text": "x"}', "no such file"),
        ('{"file_name": "a\\u0000.png", "text": "x"}', "can't be followed"),
        ('{"file_name": "a.png", "text": 5}', "its caption is 5"),
        ('{"file_name": "a.png", "text": null}', "no caption"),
        ('{"file_name": "a.png", "text": []}', "no caption"),
        ('{"file_name": "a.png", "text": [" "]}', "empty"),
        ('{"text": "x"}', "file_name"),
        ("[1]", "no JSON object"),
        ("{", "no JSON"),
    ],
)
def test_a_bad_metadata_line_is_reported_and_the_next_line_is_read(
    line: str, expected: str, root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    folder = write_images(tmp_path / "data", images)
    (tmp_path / "secret.png").write_bytes(images["a.png"])
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "metadata.jsonl").write_text(line + '\n{"file_name": "b.jpg", "text": "shoes"}\n')
    sources = Sources(settings(root, tmp_path, str(folder)).data.source, 16, tmp_path)
    bad, good = sources.records(0)
    assert isinstance(bad, BadSample)
    assert "line 1" in bad.key
    assert expected in bad.reason
    assert not isinstance(good, BadSample)
    assert good.captions == ("shoes",)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("openmoji-dem", "did you mean 'openmoji-demo'"),
        ("{}/nothing", "neither a folder nor a built-in set"),
        ("{}/empty", "no image in"),
        ("{}/loose", "put a metadata.jsonl there, or a .txt beside each image"),
        ("{}/no-*.tar", "no file matches"),
    ],
)
def test_a_path_that_is_no_source_is_an_error_with_a_remedy(
    source: str, expected: str, root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "loose", images)
    config = settings(root, tmp_path / "run", source.format(tmp_path))
    with pytest.raises(UserError) as caught:
        indexed(config)
    assert expected in str(caught.value)


def test_a_missing_column_is_an_error_that_lists_the_columns(
    root: Path, tmp_path: Path, images: dict[str, bytes]
) -> None:
    source = write_parquet(tmp_path / "data", images)
    with pytest.raises(UserError, match=r"no column 'caption' among image, text; set data\.source\.caption_column"):
        indexed(settings(root, tmp_path / "run", f"{{path: {source}, column: caption}}"))
    write_csv(tmp_path / "csv", images)
    with pytest.raises(UserError, match=r"no column 'caption' among file_name, text"):
        indexed(settings(root, tmp_path / "run", f"{{path: {tmp_path / 'csv'}, column: caption}}"))
    with pytest.raises(UserError, match=r"no column 'label' among image, text; set data\.source\.label"):
        indexed(settings(root, tmp_path / "run", source, *CLASS_CONDITIONAL))
    with pytest.raises(UserError, match=r"no column 'label' .* or name the one with classes in data\.source\.label"):
        indexed(settings(root, tmp_path / "run", str(tmp_path / "csv"), *CLASS_CONDITIONAL))


def test_a_hub_id_is_detected_as_datasets(root: Path, tmp_path: Path) -> None:
    assert detect(settings(root, tmp_path, "someone/images").data.source[0]) == "datasets"
