"""Configurations: what is read is what is meant, and what is wrong is said in one line."""

import re
from pathlib import Path

import pytest
import yaml

from ldm.config import loader, old_names
from ldm.config.schema import SampleConfig
from ldm.utils.errors import UserError

CHAIN = "stage2.prediction_type=eps"
STREAM = "data.streaming=true data.cache=none"
UPSCALE = "stage2.conditions=[text,upscale]"
PIXELS = "stage2.conditions=[] stage2.pooled_text=false stage1={model: identity}"


@pytest.fixture
def tiny(root: Path) -> Path:
    return root / "configs/tiny.yaml"


@pytest.mark.parametrize("name", ["tiny", "openmoji", "sd-512"])
def test_shipped_configurations_are_valid(root: Path, name: str) -> None:
    assert loader.load(root / f"configs/{name}.yaml").data.size in (32, 64, 512)


def test_numbers_with_an_exponent_are_numbers(tiny: Path) -> None:
    assert loader.load(tiny, ["stage2.lr=1e-4"]).stage2.lr == 1e-4


def test_no_is_a_word_and_false_a_boolean(tiny: Path) -> None:
    read = loader.load(tiny, ["run.precision=no", "data.flip=false"])
    assert (read.run.precision, read.data.flip) == ("no", False)


def test_a_dumped_configuration_reads_back_equal(tiny: Path) -> None:
    read = loader.load(tiny)
    assert loader.parse(loader.dump(read), "again") == read


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stage2.stepz=3", "did you mean 'steps'"),
        ("stage3.steps=3", "did you mean 'stage"),
        ("stage2.lr=fast", "stage2.lr: 'fast'"),
        ("stage2.lr=-1e-4", "greater than 0"),
        ("stage2.steps=1.5", "stage2.steps: 1.5"),
        ("stage2.prediction_type=flwo", "did you mean 'flow'"),
        ("data.size=33", "33 is not a multiple of 2"),
        ("stage2.channels=[30, 64]", "stage2.channels: 30 is not a multiple of 8"),
        ("stage2.attention=[true]", "1 values for 2 levels"),
        ("sample.solver=ddim", "can't be saved with stage2.prediction_type 'flow'"),
        ("sample.prompts=['']", "empty prompt"),
        ("stage2.cond_dropout=1.5", "less than 1"),
        ("stage2.lr", "expected section.key=value"),
        ("stage1.model=kl-f9", "did you mean 'kl-f8'"),
        ("stage1.channels=[30]", "stage1.channels: 30 is not a multiple of 8 (norm_num_groups); 32 would be"),
        ("stage1.train=decoder", "stage1.train: decoder needs init_from"),
        ("stage1.gan.wieght=1", "did you mean 'weight'"),
        ("stage1.gan={layers: 4, warmup: 5}", "stage1.gan.layers: 4 need sides of 48 px, and the shortest has 32"),
        ("stage1={model: identity, channels: [16, 32]}", "identity has one level and 3 channels"),
        ("stage1.channels=[]", "at least 1 item"),
        ("stage1={model: dc-f32, channels: [32, 64], latent_channels: 5}", "64 is not a multiple of 5"),
        ("stage1.gan={start: 10, warmup: 30}", "in 40 steps the autoencoder would never hear it"),
        ("stage1={equivariance: 1, gan: {}}", "equivariance: 1 leaves no step to the discriminator"),
        ("stage1.gan={norm: batch, r1: 1, warmup: 5}", "no second derivative"),
        ("stage1={l1: 0, gradient: 0}", "stage1.l1, l2, charbonnier, gradient and lpips are all 0"),
        ("stage1={model: vq-f4, gradient_checkpointing: true}", "stage1.gradient_checkpointing: diffusers has none"),
        ("stage1={model: tiny, channels: [16, 32]}", "AutoencoderTiny has the same width at every level"),
        ("stage1={pretrained: a, init_from: b}", "set one of them"),
        (f"{CHAIN} stage2.timesteps=4", "sample.steps: 5, but stage2.timesteps are 4"),
        (f"{UPSCALE} stage1={{model: tiny, channels: [16, 16]}}", "stage2.conditions: upscale needs an AutoencoderKL"),
        (f"{UPSCALE} stage1={{model: identity}}", "stage2.conditions: upscale needs an AutoencoderKL"),
        (f"stage2.conditions=[text,size] {STREAM}", "stage2.conditions: size needs data.streaming=false"),
        (f"stage2.conditions=[text,inpaint] {STREAM}", "stage2.conditions: inpaint and upscale need data.streaming"),
        (f"stage2.conditions=[text,class] {STREAM}", "stage2.conditions: a stream's classes aren't known"),
        (f"{PIXELS} {CHAIN} sample.solver=unipc", "sample.solver: 'unipc' can't be exported for pixels"),
        (f"{PIXELS} {CHAIN} sample.solver=euler", "sample.solver: 'euler' can't be exported for pixels"),
        (f"{PIXELS} sample.solver=unipc", "sample.solver: 'unipc' can't be exported for pixels"),
        ("stage2.timesteps=100", "stage2.timesteps: 100; flow passes its time in thousandths"),
        (
            f"{CHAIN} stage2.loss_weighting=learned stage2.timestep_sampling=loss",
            "stage2.timestep_sampling: loss has little effect",
        ),
        (f"{CHAIN} stage2.zero_snr=true", "stage2.zero_snr: eps can't be learned at pure noise"),
        (
            "stage2.ema_widths=[0.05,0.5]",
            "stage2.ema_widths: [0.05, 0.5]: each must be more than 0 and less than 0.2887",
        ),
        ("stage1.ema_widths=[0.1,0.1]", "stage1.ema_widths: [0.1, 0.1]: an entry is listed twice; name each once"),
        ("stage2.conditions=[text,text]", "stage2.conditions: ['text', 'text']: an entry is listed twice; name"),
        ("stage2.conditions=[inpaint]", "stage2.conditions: inpaint needs text"),
        ("stage2.conditions=[text,inpaint,upscale]", "stage2.conditions: a model has one task"),
        ("stage2.conditions=[text,class,upscale]", "stage2.conditions: upscale passes its noise level"),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(tiny: Path, override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        loader.load(tiny, re.split(r" (?=\w+[.=])", override))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_preset_fills_in_what_is_not_given(tiny: Path) -> None:
    one = loader.load(tiny, ["stage1.model=kl-f16-16ch", "stage1.layers=1"]).stage1  # not the file's channels
    assert (one.channels, one.layers, one.latent_channels) == ((128, 128, 256, 512, 512), 1, 16)
    assert one.factor == 16


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        loader.load(tmp_path / "none.yaml")


def test_differences_name_the_keys(tiny: Path) -> None:
    a, b = loader.load(tiny), loader.load(tiny, ["stage2.lr=1e-3", "run.seed=4"])
    changed = loader.differences(loader.dump(a), loader.dump(b))
    assert changed == ["run.seed: 0 → 4", "stage2.lr: 0.002 → 0.001"]


@pytest.mark.parametrize(
    "conditions", ["[]", "[class]", "[text]", "[text, class]", "[text, size]", "[text, inpaint]", "[text, upscale]"]
)
def test_what_is_written_down_is_read_again(root: Path, conditions: str) -> None:
    pooled = f"stage2.pooled_text={'text' in conditions}"
    settings = loader.load(root / "configs/tiny.yaml", [f"stage2.conditions={conditions}", pooled])
    assert loader.parse(loader.dump(settings), "a test") == settings


def test_conditions_stand_in_one_order(tiny: Path) -> None:
    assert loader.load(tiny, ["stage2.conditions=[inpaint, text]"]).stage2.conditions == ("text", "inpaint")


def test_a_section_by_itself_reads_overrides_as_the_whole_configuration_does() -> None:
    assert loader.section(SampleConfig, ["guidance=2e0", "steps=3"], "sample").guidance == 2.0
    for override, said in (("guidence=2", "did you mean 'guidance'"), ("steps=many", "steps: 'many'"), ("x", "=value")):
        with pytest.raises(UserError, match=said):
            loader.section(SampleConfig, [override], "sample")


@pytest.mark.parametrize(("stage", "batch", "parts"), [("stage1", 16, 4), ("stage2", 256, 8)])
def test_micro_batches_load_as_the_images_that_a_device_computes_at_once(
    root: Path, stage: str, batch: int, parts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    old = [f"{stage}.batch={batch}", f"{stage}.micro_batches={parts}"]
    settings = loader.load(root / "configs/tiny.yaml", old)
    assert getattr(settings, stage).device_batch == batch // parts
    said = capsys.readouterr().err
    assert said.splitlines() == [
        f"{stage}.micro_batches is now {stage}.device_batch, the images that a device computes at once: "
        f"{batch // parts} here"
    ]
    assert loader.load(root / "configs/tiny.yaml", [*old[:1], f"{stage}.device_batch={batch // parts}"]) == settings


def test_micro_batches_beside_what_replaced_them_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"stage2\.micro_batches: 2 beside stage2\.device_batch: 4"):
        loader.load(root / "configs/tiny.yaml", ["stage2.micro_batches=2", "stage2.device_batch=4"])


def test_one_micro_batch_was_the_whole_share_as_by_default(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loader.load(tiny, ["stage1.micro_batches=1"]) == loader.load(tiny)
    assert capsys.readouterr().err == ""


def test_micro_batches_were_parts_of_a_processs_share(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    old = ["stage2.batch=256", "stage2.micro_batches=8"]
    assert loader.load(tiny, old).stage2.device_batch == 256 // 8 // 8
    with pytest.raises(UserError, match=r"2 equal parts of stage2\.batch, 24, over 8 processes can't be"):
        loader.load(tiny, ["stage2.batch=24", "stage2.micro_batches=2"])


RENAMED = [
    (f"{section}.{old}", f"{section}.{new}")
    for section, kinds in {
        "run": ["RunConfig"],
        "data": ["DataConfig"],
        "stage1": ["Training", "Stage1Config"],
        "stage2": ["Training", "Stage2Config"],
    }.items()
    for kind in kinds
    for old, new in old_names.OLD_NAMES[kind].items()
]


@pytest.mark.parametrize(("old", "new"), RENAMED)
def test_an_old_name_of_a_key_loads_with_a_line_that_names_the_new_one(
    tiny: Path, tmp_path: Path, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    today = loader.load(tiny)
    section, key = new.split(".")
    value = loader.dump(today)[section][key]
    assert loader.load(tiny, [f"{old}={value}"]) == today
    assert capsys.readouterr().err == f"{old} is now {new}\n"

    tree = yaml.safe_load(tiny.read_text("utf-8"))
    tree[section].pop(key, None)
    tree[section][old.split(".")[1]] = value
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(tree), "utf-8")
    assert getattr(getattr(loader.load(file), section), key) == getattr(getattr(today, section), key)
    assert f"{old} is now {new}" in capsys.readouterr().err.splitlines()


def test_an_override_by_an_old_name_stands_above_the_files_new_one(tiny: Path) -> None:
    assert loader.load(tiny, ["stage2.ema=0.5"]).stage2.ema_decay == 0.5


def test_a_key_under_both_names_is_refused(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "both.yaml"
    file.write_text(tiny.read_text("utf-8").replace("stage2:\n", "stage2:\n  ema: 0.5\n"), "utf-8")
    with pytest.raises(UserError, match=r"stage2\.ema is now stage2\.ema_decay; leave the first out"):
        loader.load(file)


def test_the_old_names_of_presets_and_of_a_sources_keys_load(tiny: Path) -> None:
    old = loader.load(
        tiny, ["stage2.model=unet", "stage2.process=free", "data.source.column=caption", "data.source.kind=pictures"]
    )
    new = loader.load(
        tiny,
        [
            "stage2.model=custom",
            "stage2.process=custom",
            "data.source.caption_column=caption",
            "data.source.kind=images",
        ],
    )
    assert old == new


def test_a_key_that_is_there_twice_is_refused_with_its_line(tiny: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.yaml"
    for added, says in (
        ("\nstage2:\n  lr: 1e-3\n", "'stage2' is there already, in line"),
        ("\nrun2: {a: [{dir: b,\n dir: c}]}\n", "'dir' is there already, in line"),
    ):
        text = tiny.read_text() + added
        twice.write_text(text)
        with pytest.raises(UserError, match=says) as error:
            loader.load(twice)
        last = len(text.splitlines()) - (1 if "lr" in added else 0)
        assert f"{twice}: line {last}:" in str(error.value)
    with pytest.raises(UserError, match="'model' is there already"):
        loader.load(tiny, ["stage1={model: identity, model: kl}"])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("my pics #1", "my pics #1"),
        ("2024", "2024"),
        ("0123", "0123"),
        ("12:30", "12:30"),
        ("photo: cats", "photo: cats"),
        ("'my pics'", "my pics"),
        ("'it", "'it"),
        ("[best] of", "[best] of"),
        (" a ", "a"),
        ("no", "no"),
    ],
)
def test_an_override_of_a_path_is_text(tiny: Path, override: str, value: str) -> None:
    assert loader.load(tiny, [f"data.source={override}"]).data.source[0].path == value
    assert loader.load(tiny, [f"data.source.path={override}"]).data.source[0].path == value
    read = loader.load(tiny, [f"run.dir={override}", f"data.cache_dir={override}", f"stage1.pretrained={override}"])
    assert (read.run.dir, read.data.cache_dir, read.stage1.pretrained) == (Path(value), Path(value), value)


def test_an_override_may_still_be_null_a_list_or_a_section(tiny: Path) -> None:
    read = loader.load(tiny, ["data.cache_dir=null", "data.source=[a, {path: 2024, repeats: 2}]", "sample.prompts=[7]"])
    assert (read.data.cache_dir, read.sample.prompts) == (None, ("7",))
    assert [(source.path, source.repeats) for source in read.data.source] == [("a", 1), ("2024", 2)]


def test_a_comment_behind_a_number_is_no_comment(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"stage2\.lr: '1e-3 #x'"):
        loader.load(tiny, ["stage2.lr=1e-3 #x"])


def test_a_file_may_name_folders_by_numbers(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    tree = yaml.safe_load(tiny.read_text())
    for section in ("run", "data"):
        tree.pop(section, None)
    path.write_text(yaml.safe_dump(tree) + "run: {dir: 0123}\ndata: {source: [2024-01-02, {path: 1_0}], size: 32}\n")
    read = loader.load(path)
    assert (read.run.dir, [source.path for source in read.data.source]) == (Path("0123"), ["2024-01-02", "1_0"])


def test_paths_expand_and_prompts_do_not(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/mnt/disk")
    keys = ("run.dir", "data.cache_dir", "data.source", "stage1.pretrained", "stage2.init_from", "text.model")
    read = loader.load(tiny, [*(f"{key}=~/a/${{DISK}}" for key in keys), "sample.prompts=['~ $DISK']"])
    paths = (read.run.dir, read.data.cache_dir, read.data.source[0].path)
    paths += (read.stage1.pretrained, read.stage2.init_from, read.text.model)
    assert {str(path) for path in paths} == {str(Path("/home/me/a/mnt/disk")), "/home/me/a//mnt/disk"}
    assert read.sample.prompts == ("~ $DISK",)
    read = loader.load(tiny, ["stage1.init_from=$DISK/a", "text.model=open_clip:ViT-B-32:~/w.safetensors"])
    assert (read.stage1.init_from, read.text.model) == ("/mnt/disk/a", "open_clip:ViT-B-32:/home/me/w.safetensors")


@pytest.mark.parametrize(
    ("value", "says"), [("$UNSET_DISK/a", "variable UNSET_DISK is not set"), ("~no-such-user/a", "no user")]
)
def test_an_unknown_variable_or_user_is_refused(tiny: Path, value: str, says: str) -> None:
    for key in ("run.dir", "data.source.path", "text.model"):
        with pytest.raises(UserError, match=f"{key}.*{says}" if "source" not in key else says):
            loader.load(tiny, [f"{key}={value}"])


def test_a_folder_whose_name_holds_a_dollar_is_itself(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("$RECYCLE", "~old folder"):
        Path(name).mkdir()
        assert loader.load(tiny, [f"data.source={name}"]).data.source[0].path == name


@pytest.mark.parametrize("override", ["stage2.lr=.inf", "stage1.l1=.nan", "data.source={path: a, weight: 1e999}"])
def test_numbers_are_finite(tiny: Path, override: str) -> None:
    with pytest.raises(UserError, match="finite number"):
        loader.load(tiny, [override])
