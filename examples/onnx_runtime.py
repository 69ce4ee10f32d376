"""A frozen network as an ONNX file, run by ONNX Runtime.

pip install onnx onnxscript onnxruntime
python examples/onnx_runtime.py resnet50.onnx [weights.pth]
"""

import sys

import onnxruntime
import torch

import fusedres


def main(path: str, weights: str | None = None) -> None:
    torch.manual_seed(0)
    frozen = fusedres.freeze(fusedres.FusedResNet50(weights=weights))  # BatchNorm is folded
    images = torch.randn(2, 3, 224, 224)

    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=256)}}
    names = {"input_names": ["x"], "output_names": ["logits"], "dynamic_shapes": shapes}
    torch.onnx.export(frozen, (images,), path, dynamo=True, external_data=False, **names)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": images[:1].numpy()})
    with torch.no_grad():
        ours = frozen(images[:1])
    torch.testing.assert_close(torch.from_numpy(found), ours, rtol=1e-3, atol=1e-3)
    print(f"{path}: class {int(found.argmax())}, as before")


if __name__ == "__main__":
    main(*sys.argv[1:])
