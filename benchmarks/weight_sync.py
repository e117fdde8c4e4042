"""Weights to one SGLang server on this machine: through the disk, and by broadcast, side by side in one run.

    python benchmarks/weight_sync.py                # about 100 M parameters, fp32, a few minutes with the server's start

Each transport is timed from tensors in rank 0's memory until the server has proved that it serves the new version; the disk
path includes writing the files, the broadcast includes cutting buckets. The first broadcast also pays for joining the group.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_distill.sglang.client import SGLangClient
from megatron_distill.sglang.server import ServerSpec, SGLangServer, running
from megatron_distill.training.weight_sync import GROUP_NAME, Bucket, WeightsGroup, pack, send_messages

CONTEXT_TOKENS = 512


def main() -> None:
    """Start a server of a random model and time three pushes of each transport."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument("--pushes", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root) / "model"
        model = random_model(options, directory)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        print(f"{sum(t.numel() for t in tensors.values()) / 1e6:.0f} M parameters, {num_bytes / 2**20:.0f} MiB, fp32")
        server = SGLangServer(
            ServerSpec(directory, role="student", dtype="float32", context_length=CONTEXT_TOKENS),
            Path(root) / "server.log",
        )
        with (
            running([server], 900, print),
            SGLangClient([server.url], options.vocab, CONTEXT_TOKENS, key=server.key) as client,
        ):
            for version in range(1, options.pushes + 1):
                report("disk", num_bytes, push_by_disk(client, tensors, directory, Path(root) / "next", version))
            began = time.perf_counter()
            group = join(client)
            print(f"joining the group: {time.perf_counter() - began:.2f} s, once")
            for version in range(options.pushes + 1, 2 * options.pushes + 1):
                began = time.perf_counter()
                messages = map(pack, buckets(tensors, options.bucket_mib << 20))
                sent = send_messages(client, group, messages, str(version))
                report("broadcast", sent, time.perf_counter() - began)
            left = client.destroy_weights_group(group.name)
            group.leave(failed=False)
            left.result()


def random_model(options: argparse.Namespace, directory: Path) -> Qwen3ForCausalLM:
    """A random Qwen3 with tied embeddings, also written to ``directory``."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        head_dim=64,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config).float()
    model.save_pretrained(directory)
    return model


def push_by_disk(
    client: SGLangClient, tensors: dict[str, torch.Tensor], source: Path, target: Path, version: int
) -> float:
    """Write the files, let the server load them; seconds."""
    began = time.perf_counter()
    target.mkdir(exist_ok=True)
    save_file(tensors, target / "model.safetensors.partial", metadata={"format": "pt"})
    (target / "model.safetensors.partial").rename(target / "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    client.update_weights_from_disk(target, str(version))
    return time.perf_counter() - began


def join(client: SGLangClient) -> WeightsGroup:
    """The process group of this process and the server."""
    group = WeightsGroup(GROUP_NAME, "127.0.0.1", 2)
    group.join(
        client.init_weights_group(group.address, group.port, group_name=group.name, backend="gloo"), on_gpu=False
    )
    return group


def buckets(tensors: dict[str, torch.Tensor], bucket_bytes: int) -> list[Bucket]:
    """Tensors in order, cut where a bucket is full."""
    cut: list[Bucket] = [[]]
    room = bucket_bytes
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if cut[-1] and size > room:
            cut.append([])
            room = bucket_bytes
        cut[-1].append((name, tensor))
        room -= size
    return cut


def report(transport: str, num_bytes: int, seconds: float) -> None:
    """One line."""
    print(f"{transport:<10} {num_bytes / 2**20:6.0f} MiB  {seconds:6.2f} s  {num_bytes / 2**20 / seconds:7.0f} MiB/s")


if __name__ == "__main__":
    main()
