"""Layouts of folders: every file is read, reported as bad, or counted as left out."""

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


def write_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (len(str(path)) % 256, sum(map(ord, path.name)) % 256, 0)).save(path)
    return path


def write_text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")
    return path


def write_metadata(path: Path, **captions: str) -> Path:
    lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in captions.items()]
    return write_text(path, "\n".join(lines))


class Contents:
    """What a source yields: captions and repeats by key, reasons of bad samples, counts of left-out files."""

    def __init__(self, path: Path, conditions: tuple[str, ...] = CAPTIONED, **options: object):
        self.sources = Sources([SourceConfig(path=str(path), **options)], 16, path.parent / "cache", conditions)
        records = list(self.sources.records(0))
        self.good = {record.key: record for record in records if isinstance(record, Record)}
        self.captions = {key: record.captions[0] for key, record in self.good.items()}
        self.repeats = {key: record.repeats for key, record in self.good.items()}
        self.bad = {record.key: str(record) for record in records if isinstance(record, BadSample)}
        self.left_out = dict(self.sources.left_out().counts)
        self.lines = self.sources.describe()


def test_metadata_in_subfolders_is_read_by_split(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in ("train/a.png", "train/b.png", "test/c.png"):
        write_image(folder / name)
    write_metadata(folder / "train/metadata.jsonl", **{"a.png": "a dog", "b.png": "a cat"})
    write_metadata(folder / "test/metadata.jsonl", **{"c.png": "a bird"})
    contents = Contents(folder)
    assert (contents.sources.kinds, contents.bad) == (["metadata"], {})
    assert contents.captions == {"train/a.png": "a dog", "train/b.png": "a cat"}
    assert contents.left_out == {"images of other splits": 1}
    assert Contents(folder, split="test").captions == {"test/c.png": "a bird"}
    with pytest.raises(UserError, match=r"data\.source\.split: .* has no 'extra', but test, train"):
        Contents(folder, split="extra")


def test_images_that_no_metadata_row_names_are_left_out(tmp_path: Path) -> None:
    write_image(tmp_path / "data/cats/a.png")
    write_image(tmp_path / "data/cats/unnamed.png")
    write_image(tmp_path / "data/dogs/b.png")
    write_metadata(tmp_path / "data/cats/metadata.jsonl", **{"a.png": "a cat"})
    write_text(tmp_path / "data/dogs/metadata.csv", "file_name,text\nb.png,a dog\n../cats/unnamed.png,\n")
    contents = Contents(tmp_path / "data")
    assert contents.captions == {"cats/a.png": "a cat", "dogs/b.png": "a dog"}
    assert len(contents.bad) == 1
    write_image(tmp_path / "data/cats/other.png")
    write_text(tmp_path / "data/.DS_Store", "")
    assert Contents(tmp_path / "data").left_out == {"images that no row names": 1, "hidden files": 1}


def test_one_metadata_file_names_images_of_several_splits(tmp_path: Path) -> None:
    for name in ("train/a.png", "val/b.png"):
        write_image(tmp_path / "data" / name)
    write_metadata(tmp_path / "data/metadata.jsonl", **{"train/a.png": "a dog", "val/b.png": "a cat"})
    assert Contents(tmp_path / "data").captions == {"train/a.png": "a dog"}
    assert Contents(tmp_path / "data", split="validation").captions == {"val/b.png": "a cat"}


@pytest.mark.parametrize(
    "name", ["captions.json", "images/captions.csv", "images/a.json", "results.tsv", "captions.txt", "images/a.tags"]
)
def test_an_unsupported_caption_file_is_an_error_where_folder_names_would_be_used(name: str, tmp_path: Path) -> None:
    write_image(tmp_path / "data/images/a.png")
    write_image(tmp_path / "data/images/b.png")
    file = write_text(tmp_path / "data" / name, '{"images/a.png": {"caption": "a dog"}}')
    with pytest.raises(UserError, match="may hold the captions") as caught:
        detect(SourceConfig(path=str(tmp_path / "data")))
    assert str(file) in str(caught.value)
    contents = Contents(tmp_path / "data", kind="classes")  # as the message says
    assert contents.captions == {"images/a.png": "images", "images/b.png": "images"}
    assert sum(contents.left_out.values()) == 1
    assert Contents(tmp_path / "data", conditions=("class",)).good


def test_an_unsupported_caption_file_is_left_out_where_images_have_captions(tmp_path: Path) -> None:
    write_image(tmp_path / "data/a.png")
    write_text(tmp_path / "data/a.txt", "a dog")
    write_text(tmp_path / "data/captions.json", "{}")
    assert Contents(tmp_path / "data").left_out == {"tables that are not read": 1}


def test_metadata_in_the_parent_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_image(tmp_path / "set/images/a.png")
    file = write_metadata(tmp_path / "set/metadata.jsonl", **{"images/a.png": "a dog"})
    with pytest.raises(UserError) as caught:
        detect(SourceConfig(path=str(tmp_path / "set/images")))
    assert str(file) in str(caught.value)
    assert Contents(tmp_path / "set").captions == {"images/a.png": "a dog"}


@pytest.mark.parametrize("template", ["{}", "a photo of a {}"])
def test_captions_guessed_from_folder_names_are_printed(template: str, tmp_path: Path) -> None:
    write_image(tmp_path / "data/red_fox/a.png")
    lines = Contents(tmp_path / "data", template=template).lines
    caption = template.format("red fox")
    assert lines[1:] == [f"captions guessed from folder names: {caption!r}"]
    for name in ("b", "c", "d", "e"):
        write_image(tmp_path / "data" / name / "a.png")
    lines = Contents(tmp_path / "data", template=template).lines
    assert lines[1:] == ["captions guessed from folder names: " + ", ".join(repr(template.format(n)) for n in "bcd")]


def write_sidecars(folder: Path) -> None:
    for split in ("train", "test"):
        write_image(folder / split / "a.png")
        write_text(folder / split / "a.txt", split)


def write_class_folders(folder: Path) -> None:
    for split in ("train", "test"):
        write_image(folder / split / split / "a.png")


@pytest.mark.parametrize("write", [write_sidecars, write_class_folders])
def test_split_folders_are_not_mixed(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "data")
    assert list(Contents(tmp_path / "data").captions.values()) == ["train"]
    assert list(Contents(tmp_path / "data", split="test").captions.values()) == ["test"]


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
def test_caption_files_match_in_any_case_and_with_the_full_image_name(
    name: str, caption_file: str, tmp_path: Path
) -> None:
    write_image(tmp_path / "data/sub" / name)
    write_text(tmp_path / "data/sub" / caption_file, "a dog")
    contents = Contents(tmp_path / "data")
    assert (contents.sources.kinds, contents.captions, contents.left_out) == (
        ["sidecars"],
        {f"sub/{name}": "a dog"},
        {},
    )


def test_the_closest_caption_file_is_used_and_others_are_left_out(tmp_path: Path) -> None:
    for name in ("a.png", "A.png", "b.png", "b.jpg", "c.png"):
        write_image(tmp_path / "data" / name)
    for name in ("a.txt", "b.png.txt", "b.jpg.txt", "c.TXT", "c.txt", "d.txt", "notes.txt"):
        write_text(tmp_path / "data" / name, name)
    contents = Contents(tmp_path / "data")
    assert contents.captions == {"a.png": "a.txt", "b.png": "b.png.txt", "b.jpg": "b.jpg.txt", "c.png": "c.txt"}
    assert list(contents.bad) == ["A.png"]
    assert contents.left_out == {"caption files without an image": 2, "caption files that are not read": 1}
    assert contents.sources.left_out().lines() == [
        "left out   1 caption files that are not read: c.TXT",
        "left out   2 caption files without an image: d.txt, notes.txt",
    ]


@pytest.mark.parametrize("template", ["{}", "a photo of {}"])
def test_kohya_folder_names_set_repeats(template: str, tmp_path: Path) -> None:
    write_image(tmp_path / "data/10_sks dog/a.png")
    write_image(tmp_path / "data/1_dog/b.png")
    contents = Contents(tmp_path / "data", template=template)
    assert contents.captions == {"10_sks dog/a.png": template.format("sks dog"), "1_dog/b.png": template.format("dog")}
    assert contents.repeats == {"10_sks dog/a.png": 10, "1_dog/b.png": 1}
    assert contents.lines[-1] == "repeats  from folder names: 10 × 10_sks dog, 1 × 1_dog"
    assert {record.label for record in contents.good.values()} == {"sks dog", "dog"}


def test_repeats_from_folder_names_apply_to_caption_files_and_subfolders(tmp_path: Path) -> None:
    write_image(tmp_path / "data/img/5_sks_dog/a.png")
    write_image(tmp_path / "data/img/5_sks_dog/b.png")
    write_text(tmp_path / "data/img/5_sks_dog/b.txt", "sks dog in the rain")
    contents = Contents(tmp_path / "data", repeats=2)
    assert contents.sources.kinds == ["sidecars"]
    assert contents.captions == {"img/5_sks_dog/a.png": "sks dog", "img/5_sks_dog/b.png": "sks dog in the rain"}
    assert set(contents.repeats.values()) == {10}


@pytest.mark.parametrize("names", [("0_cat", "1_dog"), ("001_cat", "002_dog"), ("10_cat", "dogs")])
def test_folders_with_other_numbers_are_plain_class_names(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        write_image(tmp_path / "data" / name / "a.png")
    contents = Contents(tmp_path / "data")
    assert list(contents.captions.values()) == [name.replace("_", " ") for name in names]
    assert set(contents.repeats.values()) == {1}


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
def test_images_with_any_registered_suffix_are_read(suffix: str, file_format: str, tmp_path: Path) -> None:
    file = tmp_path / f"data/a{suffix}"
    file.parent.mkdir()
    Image.effect_noise((20, 16), 50).convert("RGB").save(file, file_format)
    write_text(tmp_path / "data/a.txt", "a dog")
    contents = Contents(tmp_path / "data")
    assert contents.captions == {file.name: "a dog"}
    assert decode(file.read_bytes()).size == ((16, 13) if suffix == ".ico" else (20, 16))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.dng", b"II*\0", "develop it"),
        ("a.psd", b"8BPS", "convert it to PNG"),
        ("a.svg", b"<svg/>", "convert it to PNG"),
        ("a.jpg_large", b"\xff\xd8\xff\xe0", "it is JPEG, but isn't named so; rename it"),
        ("a", b"\x89PNG\r\n\x1a\n", "it is PNG, but isn't named so; rename it"),
        ("a.webp!d", b"RIFF1234WEBPVP8 ", "it is WEBP, but isn't named so; rename it"),
    ],
)
def test_an_unsupported_image_is_reported_with_a_remedy(
    name: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    write_image(tmp_path / "data/good.png")
    write_text(tmp_path / "data/good.txt", "a dog")
    (tmp_path / "data" / name).write_bytes(content)
    write_text(tmp_path / "data/a.txt", "a dog")
    write_text(tmp_path / "data/notes.pdf", "%PDF")
    contents = Contents(tmp_path / "data")
    assert list(contents.good) == ["good.png"]
    assert list(contents.bad) == [name]
    assert expected in contents.bad[name]
    assert contents.left_out == {"caption files without an image": 1, "other files": 1}


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.skipif("HEIF" in FORMATS, reason="pillow-heif is installed")
@pytest.mark.parametrize("name", ["IMG_1.HEIC", "a.heif", "b.hif"])
def test_heic_is_reported_with_the_package_that_reads_it(name: str, tmp_path: Path) -> None:
    write_image(tmp_path / "data/good.png")
    write_text(tmp_path / "data/good.txt", "a dog")
    (tmp_path / "data" / name).write_bytes(HEIC)
    assert "pip install pillow-heif" in Contents(tmp_path / "data").bad[name]
    with pytest.raises(BadSampleError) as caught:
        decode(HEIC)  # as in a row of a table
    assert "pip install pillow-heif" in caught.value.args[1]


@pytest.mark.parametrize("line", ["b.png,a fox, asleep", "b.png,a,b,c,d", '"b.png",a "fox", asleep'])
def test_a_row_with_more_cells_than_the_header_is_bad(line: str, tmp_path: Path) -> None:
    write_image(tmp_path / "data/a.png")
    write_image(tmp_path / "data/b.png")
    write_text(tmp_path / "data/metadata.csv", f'file_name,text\na.png,"a fox, awake"\n{line}\n')
    contents = Contents(tmp_path / "data")
    assert contents.captions == {"a.png": "a fox, awake"}
    (bad,) = contents.bad.values()
    assert "line 3" in bad
    assert "more cells than the header; put a caption with commas in quotes" in bad


@pytest.mark.parametrize("byte_order_mark", ["", "\ufeff"])
@pytest.mark.parametrize("extension", ["txt", ".txt", "caption", ".TXT"])
def test_a_kohya_toml_is_read_with_a_byte_order_mark_and_an_extension_without_a_dot(
    byte_order_mark: str, extension: str, tmp_path: Path
) -> None:
    write_image(tmp_path / "dogs/a.png")
    write_text(tmp_path / f"dogs/a.{extension.removeprefix('.').lower()}", "a dog")
    subset = f'image_dir = "dogs"\nclass_tokens = "class"\ncaption_extension = "{extension}"'
    file = write_text(tmp_path / "set.toml", f"{byte_order_mark}[[datasets]]\n[[datasets.subsets]]\n{subset}\n")
    assert list(Contents(file).captions.values()) == ["a dog"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"template": "a {}"}, r"data\.source\.template: 'a \{\}' has no effect .* a caption file beside each image"),
        ({"caption_column": "caption"}, r"data\.source\.caption_column: 'caption' has no effect"),
        ({"image": "jpg"}, r"data\.source\.image: 'jpg' has no effect"),
        ({"split": "test"}, r"data\.source\.split: .* has no 'test', and nothing there is named after a split"),
    ],
)
def test_a_key_without_effect_is_an_error(options: dict[str, str], expected: str, tmp_path: Path) -> None:
    write_image(tmp_path / "data/a.png")
    write_text(tmp_path / "data/a.txt", "a dog")
    with pytest.raises(UserError, match=expected):
        Contents(tmp_path / "data", **options)


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    write_image(tmp_path / "disk/cats/a.png")
    write_text(tmp_path / "disk/cats/a.txt", "a cat")
    write_image(tmp_path / "data/b.png")
    write_text(tmp_path / "data/b.txt", "a dog")
    (tmp_path / "data/cats").symlink_to(tmp_path / "disk/cats")
    (tmp_path / "data/same").symlink_to(tmp_path / "disk/cats")
    (tmp_path / "disk/cats/loop").symlink_to(tmp_path / "disk")
    (tmp_path / "data/self").symlink_to(tmp_path / "data")
    contents = Contents(tmp_path / "data")
    assert contents.captions == {"b.png": "a dog", "cats/a.png": "a cat"}
    assert contents.left_out == {"links to folders that are read already": 3}
    assert "same" in contents.sources.left_out().lines()[0]


@pytest.mark.parametrize("kind", ["sidecars", "metadata"])
def test_a_hub_snapshot_is_a_source(kind: str, tmp_path: Path) -> None:
    repository = tmp_path / "hub/datasets--someone--dogs"
    snapshot = repository / "snapshots/0a1b"
    captions = write_metadata(tmp_path / "metadata.jsonl", **{"a.png": "a dog"}) if kind == "metadata" else None
    files = {"a.png": write_image(tmp_path / "a.png"), "metadata.jsonl" if captions else "a.txt": captions}
    files = {name: file or write_text(tmp_path / "a.txt", "a dog") for name, file in files.items()}
    for number, (name, file) in enumerate(files.items()):
        blob = repository / f"blobs/{number:040}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    write_text(repository / "refs/main", "0a1b")
    for source, prefix in ((snapshot, ""), (repository, "snapshots/0a1b/")):
        contents = Contents(source)
        assert (contents.captions, contents.bad) == ({f"{prefix}a.png": "a dog"}, {})
    (snapshot / "b.png").symlink_to(write_image(tmp_path / "outside.png"))
    if kind == "sidecars":
        assert "leads out of the folder" in Contents(snapshot).bad["b.png"]


@pytest.mark.parametrize("name", ["a.png", "sub/a.png"])
def test_a_single_caption_applies_to_a_folder_of_images(name: str, tmp_path: Path) -> None:
    write_image(tmp_path / "data" / name)
    write_image(tmp_path / "data/b.png")
    with pytest.raises(UserError, match=r"or set data\.source\.caption|put a metadata"):
        write_text(tmp_path / "other/notes.md", "")
        write_image(tmp_path / "other/a.png")
        Contents(tmp_path / "other")
    contents = Contents(tmp_path / "data", caption="a photo of sks dog")
    assert set(contents.captions.values()) == {"a photo of sks dog"}
    assert contents.lines[1] == "captions 'a photo of sks dog' where an image has no caption file"
    write_text(tmp_path / "data/b.txt", "sks dog asleep")
    assert Contents(tmp_path / "data", caption="a photo of sks dog").captions["b.png"] == "sks dog asleep"


@pytest.mark.parametrize("name", ["a.dng", "a.psd"])
def test_a_raw_file_next_to_its_image_is_left_out_not_bad(name: str, tmp_path: Path) -> None:
    write_image(tmp_path / "data/a.png")
    write_text(tmp_path / "data/a.txt", "a dog")
    write_text(tmp_path / "data" / name, "raw")
    assert (Contents(tmp_path / "data").bad, Contents(tmp_path / "data").left_out) == (
        {}, {"images that are read in another format": 1},
    )  # fmt: skip
    write_metadata(tmp_path / "data/metadata.jsonl", **{"a.png": "a dog"})
    contents = Contents(tmp_path / "data")
    assert (contents.bad, contents.left_out["images that no row names"]) == ({}, 1)


@pytest.mark.parametrize("name", ["IMG_1.dng", "sub/a.cr2"])
def test_a_folder_of_unsupported_images_is_an_error_with_a_remedy(name: str, tmp_path: Path) -> None:
    write_text(tmp_path / "data" / name, "raw")
    with pytest.raises(UserError, match=r"has only images that aren't read here, such as .*; develop it"):
        Contents(tmp_path / "data")


def test_captions_from_file_names(tmp_path: Path) -> None:
    for name in ("a_red_fox.png", "more/Grey heron.PNG", "b.png"):
        write_image(tmp_path / "data" / name)
    write_text(tmp_path / "data/b.txt", "its own caption")
    named = {"a_red_fox.png": "a red fox", "more/Grey heron.PNG": "Grey heron", "b.png": "its own caption"}
    contents = Contents(tmp_path / "data", caption="{}")
    assert contents.captions == named
    assert contents.lines[1] == (
        "captions from file names, such as 'a red fox', 'b', 'Grey heron', where an image has no caption file"
    )
    painted = Contents(tmp_path / "data", caption="a painting of {}").captions
    assert painted["a_red_fox.png"] == "a painting of a red fox"
