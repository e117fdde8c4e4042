"""Clusters that recipes are launched on: copy one, change it to yours, and name it: ``launch RECIPE --cluster NAME``.

A profile may also live anywhere else: ``--cluster path/to/file.py:function``.
"""

from megatron_distill.launch.nodes import ClusterProfile


def lab() -> ClusterProfile:
    """Emulated CPU nodes of ``tests/support/slurm_lab.py``: one rank or one server a node, no container."""
    return ClusterProfile(
        name="lab",
        account="lab",
        partition="lab",
        time_limit="1:00:00",
        gpus_per_node=0,
        warning_s=120,
        max_failed_starts=1,
    )


def example_h100() -> ClusterProfile:
    """Nodes of 8 H100 with pyxis and the trainer image of ``docker/``. An example: account, paths and names are made up."""
    return ClusterProfile(
        name="example_h100",
        account="research",
        partition="h100",
        time_limit="4:00:00",
        gpus_per_node=8,
        container_image="/shared/images/megatron-distill-0.1.0.sqsh",  # of a registry, each task would unpack its own copy
        container_mounts=("/shared:/shared",),
        env={"NCCL_IB_HCA": "mlx5"},
        setup=(  # compiled kernels survive a requeue on the node's own disk
            'export TRITON_CACHE_DIR="/tmp/$(id -un)/triton" TORCHINDUCTOR_CACHE_DIR="/tmp/$(id -un)/inductor"',
            'export SGLANG_DG_CACHE_DIR="/tmp/$(id -un)/deep_gemm" FLASHINFER_WORKSPACE_BASE="/tmp/$(id -un)/flashinfer"',
        ),
        sbatch={"qos": "normal"},
    )
