"""The table of layers, and what Keras calls them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedres
from fusedres.cli import main
from fusedres.models import layer_names, summary


def network(variant: str, classes: int) -> fusedres.FusedResNet50:
    with torch.device("meta"):
        return fusedres.FusedResNet50(classes, variant=variant)


@pytest.mark.parametrize(
    ("variant", "classes", "totals"),
    [
        ("coursera", 6, (23_600_006, 23_546_886, 53_120)),
        ("keras", 1000, (25_636_712, 25_583_592, 53_120)),
    ],
)
def test_totals_are_keras_when_its_biases_are_added(
    variant: str, classes: int, totals: tuple[int, int, int]
) -> None:
    model = network(variant, classes)
    table = summary(model, (64, 64, 3), variant)
    total, trainable, non_trainable = totals
    assert table.trainable + table.conv_biases == trainable
    assert table.non_trainable == non_trainable
    assert table.trainable == sum(p.numel() for p in model.parameters())
    assert sum(layer.parameters for layer in table.layers) == total - table.conv_biases
    lines = str(table).splitlines()
    assert f"trainable {table.trainable:,}, non-trainable 53,120" in lines[-2]
    expected = f"total {total:,}, trainable {trainable:,}, non-trainable {non_trainable:,}"
    assert lines[-1].endswith(expected)


def test_frozen_parameters_do_not_count_as_trainable() -> None:
    model = network("torchvision", 10)
    before = summary(model, (64, 64, 3))
    model.conv1.weight.requires_grad_(False)
    after = summary(model, (64, 64, 3))
    assert before.trainable - after.trainable == 9408 == after.non_trainable - 53_120


def test_shapes_and_connections_of_the_assignment() -> None:
    layers = {
        layer.name: layer
        for layer in summary(network("coursera", 6), (64, 64, 3), "coursera").layers
    }
    for name, kind, output, parameters, inputs in [
        ("input_1", "Input", (64, 64, 3), 0, ()),
        ("conv1", "Conv2d", (32, 32, 64), 9408, ("input_1",)),
        ("max_pooling2d_1", "MaxPool", (15, 15, 64), 0, ("activation_1",)),
        ("res2a_branch1", "Conv2d", (15, 15, 256), 16384, ("max_pooling2d_1",)),
        ("bn2a_branch1", "BatchNorm", (15, 15, 256), 1024, ("res2a_branch1",)),
        ("add_1", "Add", (15, 15, 256), 0, ("bn2a_branch2c", "bn2a_branch1")),
        ("add_2", "Add", (15, 15, 256), 0, ("bn2b_branch2c", "activation_4")),
        ("res3a_branch2a", "Conv2d", (8, 8, 128), 32768, ("activation_10",)),
        ("res5c_branch2b", "Conv2d", (2, 2, 512), 2359296, ("activation_47",)),
        ("avg_pool", "AvgPool", (1, 1, 2048), 0, ("activation_49",)),
        ("fc6", "Linear", (6,), 12294, ("flatten_1",)),
    ]:
        layer = layers[name]
        assert (layer.kind, layer.output, layer.parameters, layer.inputs) == (
            kind,
            output,
            parameters,
            inputs,
        )
    kinds = [layer.kind for layer in layers.values()]
    assert [kinds.count(k) for k in ("Conv2d", "BatchNorm", "ReLU", "Add", "Linear")] == [
        53,
        53,
        49,
        16,
        1,
    ]


@pytest.mark.parametrize("make", [fusedres.resnet18, fusedres.resnet101])
def test_other_networks_by_torch_names(make: type) -> None:
    model = make(10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = summary(model, (32, 64, 3))
    names = {layer.name for layer in table.layers}
    assert {name.rpartition(".")[0] for name in model.state_dict()} <= names
    assert len(names) == len(table.layers)
    assert table.layers[-1].output == (10,)
    assert all(set(layer.inputs) <= names for layer in table.layers)
    for name, value in model.state_dict().items():  # the model is as it was
        assert torch.equal(value, before[name])
    assert model.training and model.fused


@pytest.mark.parametrize("size", [(64, 64, 1), (16, 64, 3)])
def test_an_input_that_does_not_fit(size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"summary: input_size: .*\(H, W, 3\) from 32x32 up"):
        summary(network("torchvision", 10), size)


# Names. Spelt out block by block, as the two sources have them, so that nothing is computed twice.

ASSIGNMENT = """
2a: 1 2a 2b 2c  2b: 2a 2b 2c  2c: 2a 2b 2c
3a: 1 2a 2b 2c  3b: 2a 2b 2c  3c: 2a 2b 2c  3d: 2a 2b 2c
4a: 1 2a 2b 2c  4b: 2a 2b 2c  4c: 2a 2b 2c  4d: 2a 2b 2c  4e: 2a 2b 2c  4f: 2a 2b 2c
5a: 1 2a 2b 2c  5b: 2a 2b 2c  5c: 2a 2b 2c
"""
KERAS = """
conv2_block1: 0 1 2 3  conv2_block2: 1 2 3  conv2_block3: 1 2 3
conv3_block1: 0 1 2 3  conv3_block2: 1 2 3  conv3_block3: 1 2 3  conv3_block4: 1 2 3
conv4_block1: 0 1 2 3  conv4_block2: 1 2 3  conv4_block3: 1 2 3
conv4_block4: 1 2 3  conv4_block5: 1 2 3  conv4_block6: 1 2 3
conv5_block1: 0 1 2 3  conv5_block2: 1 2 3  conv5_block3: 1 2 3
"""


def written(table: str) -> list[tuple[str, str]]:
    """(block, layer) pairs of a table above."""
    pairs, block = [], ""
    for word in table.split():
        if word.endswith(":"):
            block = word[:-1]
        else:
            pairs.append((block, word))
    return pairs


def test_all_107_names_in_both_namings() -> None:
    model = network("coursera", 6)
    assignment, keras = layer_names(model, "coursera"), layer_names(model, "keras")
    expected = {"conv1", "bn_conv1", "fc6"}
    for block, branch in written(ASSIGNMENT):
        expected |= {f"res{block}_branch{branch}", f"bn{block}_branch{branch}"}
    assert set(assignment.values()) == expected
    expected = {"conv1_conv", "conv1_bn", "predictions"}
    for block, number in written(KERAS):
        expected |= {f"{block}_{number}_conv", f"{block}_{number}_bn"}
    assert set(keras.values()) == expected
    weighted = {
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    }
    assert len(weighted) == 107
    assert set(assignment) == set(keras) == weighted


@pytest.mark.parametrize(
    ("path", "assignment", "keras"),
    [
        ("conv1", "conv1", "conv1_conv"),
        ("bn1", "bn_conv1", "conv1_bn"),
        ("layer1.0.downsample.0", "res2a_branch1", "conv2_block1_0_conv"),
        ("layer1.0.downsample.1", "bn2a_branch1", "conv2_block1_0_bn"),
        ("layer1.0.conv1", "res2a_branch2a", "conv2_block1_1_conv"),
        ("layer2.3.bn2", "bn3d_branch2b", "conv3_block4_2_bn"),
        ("layer3.5.conv3", "res4f_branch2c", "conv4_block6_3_conv"),
        ("layer4.2.bn3", "bn5c_branch2c", "conv5_block3_3_bn"),
        ("fc", "fc6", "predictions"),
    ],
)
def test_what_a_name_stands_for(path: str, assignment: str, keras: str) -> None:
    model = network("coursera", 6)
    assert layer_names(model, "coursera")[path] == assignment
    assert layer_names(model, "keras")[path] == keras


def test_keras_names_of_deeper_networks() -> None:
    with torch.device("meta"):
        model = fusedres.resnet152()
    names = layer_names(model, "keras")
    assert names["layer3.35.conv2"] == "conv4_block36_2_conv"
    assert len(names) == 2 * 155 + 1
    with pytest.raises(ValueError, match="ResNet-50 only"):
        layer_names(model, "coursera")


def test_networks_without_names() -> None:
    with pytest.raises(ValueError, match="no stages of bottlenecks"):
        layer_names(fusedres.resnet18(), "keras")
    with pytest.raises(ValueError, match="no stages of bottlenecks"):
        layer_names(nn.Linear(1, 1), "keras")
    with pytest.raises(ValueError, match="naming: got 'caffe', accepted: 'keras', 'coursera'"):
        layer_names(network("keras", 10), "caffe")


# The command


def test_the_command_knows_the_assignments_own_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "--variant", "coursera", "--input", "64,64,3"]) == 0
    out = capsys.readouterr().out
    assert "total 23,600,006, trainable 23,546,886, non-trainable 53,120" in out
    assert "res2a_branch2a (Conv2d)" in out


def test_the_command_with_other_names_classes_and_channels(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--names", "torch", "--classes", "7", "--input", "64,32,1"]
    assert main(["summary", "--variant", "keras", *options]) == 0
    out = capsys.readouterr().out
    assert "layer1.0.conv1 (Conv2d)" in out and "(None, 7)" in out and "(None, 64, 32, 1)" in out


@pytest.mark.parametrize("model", ["resnet18", "resnet101"])
def test_the_command_falls_back_to_names_that_there_are(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert main(["summary", "--variant", "coursera", "--model", model]) == 0
    assert "layer1.0.conv1 (Conv2d)" in capsys.readouterr().out
    assert main(["summary", "--variant", "coursera", "--model", model, "--names", "coursera"]) == 1
    assert capsys.readouterr().err.startswith("fusedres: layer_names: ")


@pytest.mark.parametrize("size", ["64,64", "64x64x3", "16,64,3", "64,64,0"])
def test_the_command_with_an_input_that_makes_no_sense(
    capsys: pytest.CaptureFixture[str], size: str
) -> None:
    assert main(["summary", "--input", size]) == 2
    assert "must be H,W,C" in capsys.readouterr().err


def test_the_graph_shows_every_layer_and_connection(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["summary", "--variant", "coursera", "--graph", str(tmp_path / "g.dot")]) == 0
    dot = (tmp_path / "g.dot").read_text()
    table = summary(network("coursera", 6), (64, 64, 3), "coursera")
    assert dot == table.to_dot()
    for layer in table.layers:
        assert f'"{layer.name}" [label="{layer.name}\\n{layer.kind}' in dot
        for source in layer.inputs:
            assert f'"{source}" -> "{layer.name}";' in dot


def test_the_graph_as_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "g.svg"
    if shutil.which("dot") is None:  # stands in for Graphviz's, which a machine may lack
        program = tmp_path / "dot"
        program.write_text("#!/bin/sh\necho '<svg>'; cat; echo '</svg>'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert main(["summary", "--variant", "coursera", "--graph", str(path)]) == 0
    svg = path.read_text()
    assert "<svg" in svg and "res5c_branch2c" in svg

    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert main(["summary", "--graph", str(tmp_path / "h.svg")]) == 1
    assert "apt-get install graphviz" in capsys.readouterr().err
    assert main(["summary", "--graph", str(tmp_path / "h.gif")]) == 2
    assert not (tmp_path / "h.svg").exists()
