"""What a saved policy.py ends with: how to call it, and a run on random inputs. `codegen/torch/save.py` fills it in."""

ENDING = """

# How to run it: this file needs torch, and safetensors to read the weights beside it.
#
#     from safetensors.torch import load_file
#     from policy import Policy
#
#     policy = Policy(load_file("weights.safetensors")).eval()
#     with torch.inference_mode():
#         results = policy({arguments})
#
{types}
#
# `python policy.py [device]` runs it on random inputs.

if __name__ == "__main__":
    import sys
    from pathlib import Path

    from safetensors.torch import load_file

    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    policy = Policy(load_file(Path(__file__).with_name("weights.safetensors"))).eval().to(device)
    inputs = {{
{inputs}
    }}
    with torch.inference_mode():
        for name, value in policy(*inputs.values()).items():
            print(name, tuple(value.shape), value.dtype)
            print(value)
"""
