"""Folders as people bring them: every file is read, named as bad, or counted as left out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ldm.config.schema import SourceConfig
from ldm.data.formats import FORMATS
from ldm.data.images import decode
from ldm.data.records import BadSample, BadSampleError, Record
from ldm.data.source_kinds import CAPTIONED, detect
from ldm.data.sources import Sources
from ldm.utils.errors import UserError


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (len(str(path)) % 256, sum(map(ord, path.name)) % 256, 0)).save(path)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")
    return path


def rows(path: Path, **captions: str) -> Path:
    lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in captions.items()]
    return text(path, "\n".join(lines))


class Read:
    """What is read of a source: captions and repeats by key, reasons of bad ones, counts of what is left out."""

    def __init__(self, path: Path, conditions: tuple[str, ...] = CAPTIONED, **options: object):
        self.sources = Sources([SourceConfig(path=str(path), **options)], 16, path.parent / "cache", conditions)
        records = list(self.sources.records(0))
        self.good = {record.key: record for record in records if isinstance(record, Record)}
        self.captions = {key: record.captions[0] for key, record in self.good.items()}
        self.repeats = {key: record.repeats for key, record in self.good.items()}
        self.bad = {record.key: str(record) for record in records if isinstance(record, BadSample)}
        self.left_out = dict(self.sources.left_out().counts)
        self.lines = self.sources.describe()


def test_metadata_inside_sub_folders_is_read_and_folders_of_splits_are_chosen(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in ("train/a.png", "train/b.png", "test/c.png"):
        image(folder / name)
    rows(folder / "train/metadata.jsonl", **{"a.png": "a dog", "b.png": "a cat"})
    rows(folder / "test/metadata.jsonl", **{"c.png": "a bird"})
    read = Read(folder)
    assert (read.sources.kinds, read.bad) == (["metadata"], {})
    assert read.captions == {"train/a.png": "a dog", "train/b.png": "a cat"}
    assert read.left_out == {"images of other splits": 1}
    assert Read(folder, split="test").captions == {"test/c.png": "a bird"}
    with pytest.raises(UserError, match=r"data\.source\.split: .* has no 'extra', but test, train"):
        Read(folder, split="extra")


def test_metadata_in_some_sub_folders_leaves_out_what_it_does_not_name(tmp_path: Path) -> None:
    image(tmp_path / "data/cats/a.png")
    image(tmp_path / "data/cats/unnamed.png")
    image(tmp_path / "data/dogs/b.png")
    rows(tmp_path / "data/cats/metadata.jsonl", **{"a.png": "a cat"})
    text(tmp_path / "data/dogs/metadata.csv", "file_name,text\nb.png,a dog\n../cats/unnamed.png,\n")
    read = Read(tmp_path / "data")
    assert read.captions == {"cats/a.png": "a cat", "dogs/b.png": "a dog"}
    assert len(read.bad) == 1
    image(tmp_path / "data/cats/other.png")
    text(tmp_path / "data/.DS_Store", "")
    assert Read(tmp_path / "data").left_out == {"images that no row names": 1, "hidden files": 1}


def test_one_metadata_file_names_images_of_several_splits(tmp_path: Path) -> None:
    for name in ("train/a.png", "val/b.png"):
        image(tmp_path / "data" / name)
    rows(tmp_path / "data/metadata.jsonl", **{"train/a.png": "a dog", "val/b.png": "a cat"})
    assert Read(tmp_path / "data").captions == {"train/a.png": "a dog"}
    assert Read(tmp_path / "data", split="validation").captions == {"val/b.png": "a cat"}


@pytest.mark.parametrize(
    "name", ["captions.json", "images/captions.csv", "images/a.json", "results.tsv", "captions.txt", "images/a.tags"]
)
def test_a_caption_file_that_is_not_understood_is_named_instead_of_folder_names(name: str, tmp_path: Path) -> None:
    image(tmp_path / "data/images/a.png")
    image(tmp_path / "data/images/b.png")
    file = text(tmp_path / "data" / name, '{"images/a.png": {"caption": "a dog"}}')
    with pytest.raises(UserError, match="may hold the captions") as caught:
        detect(SourceConfig(path=str(tmp_path / "data")))
    assert str(file) in str(caught.value)
    read = Read(tmp_path / "data", kind="classes")  # as the message says
    assert read.captions == {"images/a.png": "images", "images/b.png": "images"}
    assert sum(read.left_out.values()) == 1
    assert Read(tmp_path / "data", conditions=("class",)).good


def test_a_caption_file_beside_captioned_images_is_counted(tmp_path: Path) -> None:
    image(tmp_path / "data/a.png")
    text(tmp_path / "data/a.txt", "a dog")
    text(tmp_path / "data/captions.json", "{}")
    assert Read(tmp_path / "data").left_out == {"tables that are not read": 1}


def test_metadata_above_the_source_is_named(tmp_path: Path) -> None:
    image(tmp_path / "set/images/a.png")
    file = rows(tmp_path / "set/metadata.jsonl", **{"images/a.png": "a dog"})
    with pytest.raises(UserError) as caught:
        detect(SourceConfig(path=str(tmp_path / "set/images")))
    assert str(file) in str(caught.value)
    assert Read(tmp_path / "set").captions == {"images/a.png": "a dog"}


@pytest.mark.parametrize("template", ["{}", "a photo of a {}"])
def test_captions_guessed_from_folders_are_shown(template: str, tmp_path: Path) -> None:
    image(tmp_path / "data/red_fox/a.png")
    lines = Read(tmp_path / "data", template=template).lines
    caption = template.format("red fox")
    assert lines[1:] == [f"captions guessed from folder names: {caption!r}"]
    for name in ("b", "c", "d", "e"):
        image(tmp_path / "data" / name / "a.png")
    lines = Read(tmp_path / "data", template=template).lines
    assert lines[1:] == ["captions guessed from folder names: " + ", ".join(repr(template.format(n)) for n in "bcd")]


def write_sidecars(folder: Path) -> None:
    for split in ("train", "test"):
        image(folder / split / "a.png")
        text(folder / split / "a.txt", split)


def write_class_folders(folder: Path) -> None:
    for split in ("train", "test"):
        image(folder / split / split / "a.png")


@pytest.mark.parametrize("write", [write_sidecars, write_class_folders])
def test_folders_of_splits_are_not_mixed(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "data")
    assert list(Read(tmp_path / "data").captions.values()) == ["train"]
    assert list(Read(tmp_path / "data", split="test").captions.values()) == ["test"]


@pytest.mark.parametrize(
    ("name", "caption_file"),
    [
        ("IMG_1.PNG", "IMG_1.TXT"),
        ("a.png", "a.png.txt"),
        ("a.b.png", "a.b.Txt"),
        ("a.png", "a.PNG.caption"),
        ("Photo.png", "photo.txt"),
        ("a.png", "a.Caption"),
    ],
)
def test_caption_files_fit_in_any_case_and_after_the_images_full_name(
    name: str, caption_file: str, tmp_path: Path
) -> None:
    image(tmp_path / "data/sub" / name)
    text(tmp_path / "data/sub" / caption_file, "a dog")
    read = Read(tmp_path / "data")
    assert (read.sources.kinds, read.captions, read.left_out) == (["sidecars"], {f"sub/{name}": "a dog"}, {})


def test_the_nearest_caption_file_is_taken_and_others_are_counted(tmp_path: Path) -> None:
    for name in ("a.png", "A.png", "b.png", "b.jpg", "c.png"):
        image(tmp_path / "data" / name)
    for name in ("a.txt", "b.png.txt", "b.jpg.txt", "c.TXT", "c.txt", "d.txt", "notes.txt"):
        text(tmp_path / "data" / name, name)
    read = Read(tmp_path / "data")
    assert read.captions == {"a.png": "a.txt", "b.png": "b.png.txt", "b.jpg": "b.jpg.txt", "c.png": "c.txt"}
    assert list(read.bad) == ["A.png"]
    assert read.left_out == {"caption files without an image": 3}
    assert read.sources.left_out().lines() == ["left out   3 caption files without an image: c.TXT, d.txt, notes.txt"]


@pytest.mark.parametrize("template", ["{}", "a photo of {}"])
def test_folders_named_as_kohya_does_are_repeated(template: str, tmp_path: Path) -> None:
    image(tmp_path / "data/10_sks dog/a.png")
    image(tmp_path / "data/1_dog/b.png")
    read = Read(tmp_path / "data", template=template)
    assert read.captions == {"10_sks dog/a.png": template.format("sks dog"), "1_dog/b.png": template.format("dog")}
    assert read.repeats == {"10_sks dog/a.png": 10, "1_dog/b.png": 1}
    assert read.lines[-1] == "repeats  from folder names: 10 × 10_sks dog, 1 × 1_dog"
    assert {record.label for record in read.good.values()} == {"sks dog", "dog"}


def test_repeats_of_folders_hold_for_caption_files_and_deeper_folders(tmp_path: Path) -> None:
    image(tmp_path / "data/img/5_sks_dog/a.png")
    image(tmp_path / "data/img/5_sks_dog/b.png")
    text(tmp_path / "data/img/5_sks_dog/b.txt", "sks dog in the rain")
    read = Read(tmp_path / "data", repeats=2)
    assert read.sources.kinds == ["sidecars"]
    assert read.captions == {"img/5_sks_dog/a.png": "sks dog", "img/5_sks_dog/b.png": "sks dog in the rain"}
    assert set(read.repeats.values()) == {10}


@pytest.mark.parametrize("names", [("0_cat", "1_dog"), ("001_cat", "002_dog"), ("10_cat", "dogs")])
def test_folders_with_other_numbers_are_classes_as_they_are(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        image(tmp_path / "data" / name / "a.png")
    read = Read(tmp_path / "data")
    assert list(read.captions.values()) == [name.replace("_", " ") for name in names]
    assert set(read.repeats.values()) == {1}


@pytest.mark.parametrize(
    ("suffix", "file_format"),
    [
        (".jpe", "JPEG"),
        (".JP2", "JPEG2000"),
        (".ppm", "PPM"),
        (".apng", "PNG"),
        (".tga", "TGA"),
        (".pgm", "PPM"),
        (".ico", "ICO"),
        (".pcx", "PCX"),
        (".qoi", "QOI"),
        (".dib", "BMP"),
        (".mpo", "JPEG"),
        (".sgi", "SGI"),
    ],
)
def test_images_are_read_whatever_their_registered_suffix(suffix: str, file_format: str, tmp_path: Path) -> None:
    file = tmp_path / f"data/a{suffix}"
    file.parent.mkdir()
    Image.effect_noise((20, 16), 50).convert("RGB").save(file, file_format)
    text(tmp_path / "data/a.txt", "a dog")
    read = Read(tmp_path / "data")
    assert read.captions == {file.name: "a dog"}
    assert decode(file.read_bytes()).size == ((16, 13) if suffix == ".ico" else (20, 16))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.dng", b"II*\0", "develop it"),
        ("a.psd", b"8BPS", "convert it to PNG"),
        ("a.svg", b"<svg/>", "convert it to PNG"),
        ("a.jpg_large", b"\xff\xd8\xff\xe0", "it is JPEG, but isn't named so; rename it"),
        ("a", b"\x89PNG\r\n\x1a\n", "it is PNG, but isn't named so; rename it"),
        ("a.webp!d", b"RIFF1234WEBPVP8 ", "it is WEBP, but isn't named so; rename it"),
    ],
)
def test_an_image_that_is_not_read_is_named_with_what_to_do(
    name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    image(tmp_path / "data/good.png")
    text(tmp_path / "data/good.txt", "a dog")
    (tmp_path / "data" / name).write_bytes(content)
    text(tmp_path / "data/a.txt", "a dog")
    text(tmp_path / "data/notes.pdf", "%PDF")
    read = Read(tmp_path / "data")
    assert list(read.good) == ["good.png"]
    assert list(read.bad) == [name]
    assert says in read.bad[name]
    assert read.left_out == {"caption files without an image": 1, "other files": 1}


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.skipif("HEIF" in FORMATS, reason="pillow-heif is installed")
@pytest.mark.parametrize("name", ["IMG_1.HEIC", "a.heif", "b.hif"])
def test_heic_names_the_package_that_reads_it(name: str, tmp_path: Path) -> None:
    image(tmp_path / "data/good.png")
    text(tmp_path / "data/good.txt", "a dog")
    (tmp_path / "data" / name).write_bytes(HEIC)
    assert "pip install pillow-heif" in Read(tmp_path / "data").bad[name]
    with pytest.raises(BadSampleError) as caught:
        decode(HEIC)  # as a row of a table has it
    assert "pip install pillow-heif" in caught.value.args[1]


@pytest.mark.parametrize("line", ["b.png,a fox, asleep", "b.png,a,b,c,d", '"b.png",a "fox", asleep'])
def test_a_row_with_more_cells_than_the_header_is_bad(line: str, tmp_path: Path) -> None:
    image(tmp_path / "data/a.png")
    image(tmp_path / "data/b.png")
    text(tmp_path / "data/metadata.csv", f'file_name,text\na.png,"a fox, awake"\n{line}\n')
    read = Read(tmp_path / "data")
    assert read.captions == {"a.png": "a fox, awake"}
    (bad,) = read.bad.values()
    assert "line 3" in bad
    assert "more cells than the header; put a caption with commas in quotes" in bad


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("extension", ["txt", ".txt", "caption", ".TXT"])
def test_kohyas_toml_is_read_with_a_byte_order_mark_and_an_extension_without_a_dot(
    mark: str, extension: str, tmp_path: Path
) -> None:
    image(tmp_path / "dogs/a.png")
    text(tmp_path / f"dogs/a.{extension.removeprefix('.').lower()}", "a dog")
    subset = f'image_dir = "dogs"\nclass_tokens = "class"\ncaption_extension = "{extension}"'
    file = text(tmp_path / "set.toml", f"{mark}[[datasets]]\n[[datasets.subsets]]\n{subset}\n")
    assert list(Read(file).captions.values()) == ["a dog"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"template": "a {}"}, r"data\.source\.template: 'a \{\}' has no effect .* a caption file beside each image"),
        ({"caption_column": "caption"}, r"data\.source\.caption_column: 'caption' has no effect"),
        ({"image": "jpg"}, r"data\.source\.image: 'jpg' has no effect"),
        ({"split": "test"}, r"data\.source\.split: .* has no 'test', and nothing there is named after a split"),
    ],
)
def test_a_key_without_effect_is_an_error(options: dict[str, str], says: str, tmp_path: Path) -> None:
    image(tmp_path / "data/a.png")
    text(tmp_path / "data/a.txt", "a dog")
    with pytest.raises(UserError, match=says):
        Read(tmp_path / "data", **options)


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    image(tmp_path / "disk/cats/a.png")
    text(tmp_path / "disk/cats/a.txt", "a cat")
    image(tmp_path / "data/b.png")
    text(tmp_path / "data/b.txt", "a dog")
    (tmp_path / "data/cats").symlink_to(tmp_path / "disk/cats")
    (tmp_path / "data/same").symlink_to(tmp_path / "disk/cats")
    (tmp_path / "disk/cats/loop").symlink_to(tmp_path / "disk")
    (tmp_path / "data/self").symlink_to(tmp_path / "data")
    read = Read(tmp_path / "data")
    assert read.captions == {"b.png": "a dog", "cats/a.png": "a cat"}
    assert read.left_out == {"links to folders that are read already": 3}
    assert "same" in read.sources.left_out().lines()[0]


@pytest.mark.parametrize("kind", ["sidecars", "metadata"])
def test_a_snapshot_of_the_hub_is_a_source(kind: str, tmp_path: Path) -> None:
    repository = tmp_path / "hub/datasets--someone--dogs"
    snapshot = repository / "snapshots/0a1b"
    captions = rows(tmp_path / "metadata.jsonl", **{"a.png": "a dog"}) if kind == "metadata" else None
    files = {"a.png": image(tmp_path / "a.png"), "metadata.jsonl" if captions else "a.txt": captions}
    files = {name: file or text(tmp_path / "a.txt", "a dog") for name, file in files.items()}
    for number, (name, file) in enumerate(files.items()):
        blob = repository / f"blobs/{number:040}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    text(repository / "refs/main", "0a1b")
    for source, prefix in ((snapshot, ""), (repository, "snapshots/0a1b/")):
        read = Read(source)
        assert (read.captions, read.bad) == ({f"{prefix}a.png": "a dog"}, {})
    (snapshot / "b.png").symlink_to(image(tmp_path / "outside.png"))
    if kind == "sidecars":
        assert "leads out of the folder" in Read(snapshot).bad["b.png"]


@pytest.mark.parametrize("name", ["a.png", "sub/a.png"])
def test_one_caption_serves_a_folder_of_images(name: str, tmp_path: Path) -> None:
    image(tmp_path / "data" / name)
    image(tmp_path / "data/b.png")
    with pytest.raises(UserError, match=r"or set data\.source\.caption|put a metadata"):
        text(tmp_path / "other/notes.md", "")
        image(tmp_path / "other/a.png")
        Read(tmp_path / "other")
    read = Read(tmp_path / "data", caption="a photo of sks dog")
    assert set(read.captions.values()) == {"a photo of sks dog"}
    assert read.lines[1] == "captions 'a photo of sks dog' where an image has no caption file"
    text(tmp_path / "data/b.txt", "sks dog asleep")
    assert Read(tmp_path / "data", caption="a photo of sks dog").captions["b.png"] == "sks dog asleep"


@pytest.mark.parametrize("name", ["a.dng", "a.psd"])
def test_a_raw_file_beside_its_image_is_left_out_not_bad(name: str, tmp_path: Path) -> None:
    image(tmp_path / "data/a.png")
    text(tmp_path / "data/a.txt", "a dog")
    text(tmp_path / "data" / name, "raw")
    assert (Read(tmp_path / "data").bad, Read(tmp_path / "data").left_out) == (
        {}, {"images that are read in another format": 1},
    )  # fmt: skip
    rows(tmp_path / "data/metadata.jsonl", **{"a.png": "a dog"})
    read = Read(tmp_path / "data")
    assert (read.bad, read.left_out["images that no row names"]) == ({}, 1)


@pytest.mark.parametrize("name", ["IMG_1.dng", "sub/a.cr2"])
def test_a_folder_of_images_that_are_not_read_names_the_remedy(name: str, tmp_path: Path) -> None:
    text(tmp_path / "data" / name, "raw")
    with pytest.raises(UserError, match=r"has only images that aren't read here, such as .*; develop it"):
        Read(tmp_path / "data")
