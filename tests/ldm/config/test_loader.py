"""Loading configurations: values, overrides, paths and old names are read as written, and mistakes take one line."""

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


def test_shipped_configurations_are_valid(root: Path) -> None:
    sizes = {path.stem: loader.load(path).data.size for path in (root / "configs").glob("*.yaml")}
    named = {name: int(size[1]) for name in sizes if (size := re.search(r"-(\d{3,})\b", name))}
    assert len(sizes) >= 12
    assert named.items() <= sizes.items()


def test_numbers_with_an_exponent_are_numbers(tiny: Path) -> None:
    assert loader.load(tiny, ["stage2.lr=1e-4"]).stage2.lr == 1e-4


def test_no_is_a_string_and_false_a_boolean(tiny: Path) -> None:
    config = loader.load(tiny, ["run.precision=no", "data.flip=false"])
    assert (config.run.precision, config.data.flip) == ("no", False)


def test_a_dumped_configuration_reads_back_equal(tiny: Path) -> None:
    config = loader.load(tiny)
    assert loader.parse(loader.dump(config), "a dump") == config


def test_the_configuration_of_a_run_is_read_as_a_file_of_its_own(tiny: Path, tmp_path: Path) -> None:
    tree = {"about": {"command": "train_ldm.py"}, "configuration": loader.dump(loader.load(tiny))}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert loader.load(tmp_path / "config.yaml", ["stage2.steps=9"]) == loader.load(tiny, ["stage2.steps=9"])


@pytest.mark.parametrize(
    ("override", "message"),
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
        (
            "stage1={model: dc-f32, channels: [32, 96]}",
            "stage1.channels: 96 after 32; the shortcut needs a divisor of 128",
        ),
        (
            "stage1={model: dc-f4-small, channels: [6, 6, 6], latent_channels: 3}",
            "6 is not a multiple of 4 (pixels that",
        ),
        ("stage1={model: dc-f4-small, decoder_channels: [32, 64]}", "stage1.decoder_channels: [32, 64]; give 3 widths"),
        ("stage1={model: dc-f4-small, decoder_channels: [32, 64, 100]}", "stage1.decoder_channels: 100 after 64"),
        ("stage1={model: dc-f4-small, kl: 1e-5}", "stage1.kl: dc-f4-small has no posterior"),
        ("stage1.decoder_layers=2", "stage1.decoder_layers: is of dc, and model is kl; leave it out"),
        (
            "stage1={model: vq-f4, decoder_channels: [32, 64, 128]}",
            "stage1.decoder_channels: is of dc, and model is vq-f4",
        ),
        ("stage1.gan={start: 10, warmup: 30}", "in 40 steps the autoencoder would never be trained with it"),
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
        (
            f"data.prefetch_factor=4 data.buckets=null data.val_fraction=0 {STREAM}",
            "data.prefetch_factor: is of indexed data",
        ),
        ("data.stream_lanes=8", "data.stream_lanes: is of data.streaming; set that to true, or leave it out"),
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
        ("stage2.optimizer=prodigy", "stage2.lr: 0.002; prodigy finds its step size and multiplies it by lr, so 1"),
        (
            "stage1.optimizer=prodigy stage1.lr=1 stage1.gan={warmup: 5}",
            "stage1.gan.lr: 0.0001; the discriminator has stage1.optimizer too",
        ),
        (
            "stage2.optimizer=schedulefree stage2.lr_scheduler=cosine",
            "stage2.lr_scheduler: cosine, which schedulefree replaces; set it to constant",
        ),
        (
            "stage2.optimizer=schedulefree stage2.ema_widths=[0.1]",
            "stage2.ema_widths: schedulefree averages the weights itself; set it to []",
        ),
        ("stage2.optimizer=schedulefree stage2.betas=[0,0.9]", "stage2.betas: the first is 0"),
        ("stage2.conditions=[text,text]", "stage2.conditions: ['text', 'text']: an entry is listed twice; name"),
        ("stage2.conditions=[inpaint]", "stage2.conditions: inpaint needs text"),
        ("stage2.conditions=[text,inpaint,upscale]", "stage2.conditions: a model has one task"),
        ("stage2.conditions=[text,class,upscale]", "stage2.conditions: upscale passes its noise level"),
    ],
)
def test_a_mistake_is_reported_in_one_line_with_its_remedy(tiny: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        loader.load(tiny, re.split(r" (?=\w+[.=])", override))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_preset_sets_the_keys_that_are_not_overridden(tiny: Path) -> None:
    stage1 = loader.load(tiny, ["stage1.model=kl-f16-16ch", "stage1.layers=1"]).stage1  # not the file's channels
    assert (stage1.channels, stage1.layers, stage1.latent_channels) == ((128, 128, 256, 512, 512), 1, 16)
    assert stage1.factor == 16


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        loader.load(tmp_path / "none.yaml")


def test_differences_list_keys_with_both_values(tiny: Path) -> None:
    a, b = loader.load(tiny), loader.load(tiny, ["stage2.lr=1e-3", "run.seed=4"])
    changed = loader.differences(loader.dump(a), loader.dump(b))
    assert changed == ["run.seed: 0 → 4", "stage2.lr: 0.002 → 0.001"]


@pytest.mark.parametrize(
    "conditions", ["[]", "[class]", "[text]", "[text, class]", "[text, size]", "[text, inpaint]", "[text, upscale]"]
)
def test_a_dumped_configuration_with_conditions_reads_back_equal(root: Path, conditions: str) -> None:
    pooled = f"stage2.pooled_text={'text' in conditions}"
    settings = loader.load(root / "configs/tiny.yaml", [f"stage2.conditions={conditions}", pooled])
    assert loader.parse(loader.dump(settings), "a test") == settings


def test_conditions_are_sorted_into_a_fixed_order(tiny: Path) -> None:
    assert loader.load(tiny, ["stage2.conditions=[inpaint, text]"]).stage2.conditions == ("text", "inpaint")


def test_a_single_section_reads_overrides_as_the_full_configuration_does() -> None:
    assert loader.section(SampleConfig, ["guidance=2e0", "steps=3"], "sample").guidance == 2.0
    for override, message in (
        ("guidence=2", "did you mean 'guidance'"),
        ("steps=many", "steps: 'many'"),
        ("x", "=value"),
    ):
        with pytest.raises(UserError, match=message):
            loader.section(SampleConfig, [override], "sample")


@pytest.mark.parametrize(("stage", "batch", "parts"), [("stage1", 16, 4), ("stage2", 256, 8)])
def test_micro_batches_load_as_device_batch(
    root: Path, stage: str, batch: int, parts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    old_overrides = [f"{stage}.batch={batch}", f"{stage}.micro_batches={parts}"]
    settings = loader.load(root / "configs/tiny.yaml", old_overrides)
    assert getattr(settings, stage).device_batch == batch // parts
    message = capsys.readouterr().err
    assert message.splitlines() == [
        f"{stage}.micro_batches is now {stage}.device_batch, the images that a device computes at once: "
        f"{batch // parts} here"
    ]
    new_overrides = [f"{stage}.batch={batch}", f"{stage}.device_batch={batch // parts}"]
    assert loader.load(root / "configs/tiny.yaml", new_overrides) == settings


def test_micro_batches_together_with_device_batch_are_refused(root: Path) -> None:
    with pytest.raises(
        UserError, match=r"stage2\.micro_batches: 2 and stage2\.device_batch: 4 are both set; leave the first out"
    ):
        loader.load(root / "configs/tiny.yaml", ["stage2.micro_batches=2", "stage2.device_batch=4"])


def test_a_single_micro_batch_equals_the_default(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loader.load(tiny, ["stage1.micro_batches=1"]) == loader.load(tiny)
    assert capsys.readouterr().err == ""


def test_micro_batches_divide_the_batch_of_a_process(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    old_overrides = ["stage2.batch=256", "stage2.micro_batches=8"]
    assert loader.load(tiny, old_overrides).stage2.device_batch == 256 // 8 // 8
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
def test_an_old_key_loads_with_a_line_that_names_the_new_key(
    tiny: Path, tmp_path: Path, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    current = loader.load(tiny)
    section, key = new.split(".")
    value = loader.dump(current)[section][key]
    assert loader.load(tiny, [f"{old}={value}"]) == current
    assert capsys.readouterr().err == f"{old} is now {new}\n"

    tree = yaml.safe_load(tiny.read_text("utf-8"))
    tree[section].pop(key, None)
    tree[section][old.split(".")[1]] = value
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(tree), "utf-8")
    assert getattr(getattr(loader.load(file), section), key) == getattr(getattr(current, section), key)
    assert f"{old} is now {new}" in capsys.readouterr().err.splitlines()


def test_an_override_by_an_old_key_wins_over_the_files_new_key(tiny: Path) -> None:
    assert loader.load(tiny, ["stage2.ema=0.5"]).stage2.ema_decay == 0.5


def test_a_key_under_both_names_is_refused(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "both.yaml"
    file.write_text(tiny.read_text("utf-8").replace("stage2:\n", "stage2:\n  ema: 0.5\n"), "utf-8")
    with pytest.raises(UserError, match=r"stage2\.ema is now stage2\.ema_decay; leave the first out"):
        loader.load(file)


def test_old_names_of_presets_and_of_source_keys_load(tiny: Path) -> None:
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


def test_a_duplicate_key_is_refused_with_its_line(tiny: Path, tmp_path: Path) -> None:
    duplicate = tmp_path / "twice.yaml"
    for addition, message in (
        ("\nstage2:\n  lr: 1e-3\n", "'stage2' is there already, in line"),
        ("\nrun2: {a: [{dir: b,\n dir: c}]}\n", "'dir' is there already, in line"),
    ):
        text = tiny.read_text() + addition
        duplicate.write_text(text)
        with pytest.raises(UserError, match=message) as error:
            loader.load(duplicate)
        line = len(text.splitlines()) - (1 if "lr" in addition else 0)
        assert f"{duplicate}: line {line}:" in str(error.value)
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
def test_an_override_of_a_path_is_a_string(tiny: Path, override: str, value: str) -> None:
    assert loader.load(tiny, [f"data.source={override}"]).data.source[0].path == value
    assert loader.load(tiny, [f"data.source.path={override}"]).data.source[0].path == value
    config = loader.load(tiny, [f"run.dir={override}", f"data.cache_dir={override}", f"stage1.pretrained={override}"])
    assert (config.run.dir, config.data.cache_dir, config.stage1.pretrained) == (Path(value), Path(value), value)


def test_an_override_may_still_be_null_a_list_or_a_section(tiny: Path) -> None:
    config = loader.load(
        tiny, ["data.cache_dir=null", "data.source=[a, {path: 2024, repeats: 2}]", "sample.prompts=[7]"]
    )
    assert (config.data.cache_dir, config.sample.prompts) == (None, ("7",))
    assert [(source.path, source.repeats) for source in config.data.source] == [("a", 1), ("2024", 2)]


def test_an_override_has_no_comments(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"stage2\.lr: '1e-3 #x'"):
        loader.load(tiny, ["stage2.lr=1e-3 #x"])


def test_folder_names_that_look_like_numbers_are_strings_in_a_file(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    tree = yaml.safe_load(tiny.read_text())
    for section in ("run", "data"):
        tree.pop(section, None)
    path.write_text(yaml.safe_dump(tree) + "run: {dir: 0123}\ndata: {source: [2024-01-02, {path: 1_0}], size: 32}\n")
    config = loader.load(path)
    assert (config.run.dir, [source.path for source in config.data.source]) == (Path("0123"), ["2024-01-02", "1_0"])


def test_variables_and_home_expand_in_paths_but_not_in_prompts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/mnt/disk")
    keys = ("run.dir", "data.cache_dir", "data.source", "stage1.pretrained", "stage2.init_from", "text.model")
    config = loader.load(tiny, [*(f"{key}=~/a/${{DISK}}" for key in keys), "sample.prompts=['~ $DISK']"])
    paths = (config.run.dir, config.data.cache_dir, config.data.source[0].path)
    paths += (config.stage1.pretrained, config.stage2.init_from, config.text.model)
    assert {str(path) for path in paths} == {str(Path("/home/me/a/mnt/disk")), "/home/me/a//mnt/disk"}
    assert config.sample.prompts == ("~ $DISK",)
    config = loader.load(tiny, ["stage1.init_from=$DISK/a", "text.model=open_clip:ViT-B-32:~/w.safetensors"])
    assert (config.stage1.init_from, config.text.model) == ("/mnt/disk/a", "open_clip:ViT-B-32:/home/me/w.safetensors")


@pytest.mark.parametrize(
    ("value", "message"), [("$UNSET_DISK/a", "variable UNSET_DISK is not set"), ("~no-such-user/a", "no user")]
)
def test_an_unknown_variable_or_user_is_refused(tiny: Path, value: str, message: str) -> None:
    for key in ("run.dir", "data.source.path", "text.model"):
        with pytest.raises(UserError, match=f"{key}.*{message}" if "source" not in key else message):
            loader.load(tiny, [f"{key}={value}"])


def test_an_existing_folder_with_a_dollar_or_tilde_in_its_name_is_not_expanded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("$RECYCLE", "~old folder"):
        Path(name).mkdir()
        assert loader.load(tiny, [f"data.source={name}"]).data.source[0].path == name


@pytest.mark.parametrize("override", ["stage2.lr=.inf", "stage1.l1=.nan", "data.source={path: a, weight: 1e999}"])
def test_infinite_and_nan_numbers_are_refused(tiny: Path, override: str) -> None:
    with pytest.raises(UserError, match="finite number"):
        loader.load(tiny, [override])
