"""A frozen network as one file of plain torch ops, which runs without fusedres.

python examples/torch_export.py resnet50.pt2 [weights.pth]
"""

import sys

import torch

import fusedres

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images trained on


def main(path: str, weights: str | None = None) -> None:
    torch.manual_seed(0)
    model = fusedres.FusedResNet50(weights=weights)
    frozen = fusedres.freeze(model, mean=MEAN, std=STD)  # BatchNorm folded, uint8 frames as input
    frames = torch.randint(256, (2, 224, 224, 3), dtype=torch.uint8)

    batch = torch.export.Dim("batch", min=1, max=256)
    exported = torch.export.export(frozen, (frames,), dynamic_shapes=({0: batch},))
    torch.export.save(exported, path)

    again = torch.export.load(path).module()
    with torch.no_grad():
        ours, theirs = frozen(frames[:1]), again(frames[:1])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    print(f"{path}: class {int(theirs.argmax())}, as before")


if __name__ == "__main__":
    main(*sys.argv[1:])
