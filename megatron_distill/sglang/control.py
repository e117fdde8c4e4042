"""Operations on all replicas of a server at once: weights in, pause, flush. The half of the client that changes a server.

Nothing here is retried but a flush. What half happened to a set of replicas must be looked at, not repeated: each error says
what to send again, and ``wait_reachable`` and ``begin_weight_update`` make it possible. The first replica that fails ends the
wait for the others. The sequence of a distributed update, which SGLang 0.5.23 insists on:

    joined = client.init_weights_group(...); <rank 0 joins>; joined.result()
    client.pause(); client.flush_cache(); client.begin_weight_update()
    for each bucket:  sent = client.update_weights_from_distributed(...); <broadcast>; sent.result()
    client.end_weight_update(); client.require_weight_version(version); client.continue_generation()
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Literal

from megatron_distill.errors import ServerError
from megatron_distill.sglang.model_dir import require_same_tensors, tensor_names
from megatron_distill.sglang.transport import RefusedError, Replica, ReplicaPool
from megatron_distill.sglang.wire import Json

_FLUSH_EVERY_S = (0.005, 0.1)  # shortest and longest pause between two tries


class ReplicaControl:
    """Changes what all replicas of a pool serve. ``SGLangClient`` is one."""

    def __init__(self, pool: ReplicaPool, control_timeout_s: float) -> None:
        """Open no connection yet.

        Args:
            pool: the replicas.
            control_timeout_s: longest wait for one operation.
        """
        self._pool = pool
        self._control_timeout_s = control_timeout_s
        self._served_tensors: set[str] | None = None

    @property
    def urls(self) -> list[str]:
        """Where the replicas listen, in order."""
        return [replica.url for replica in self._pool.replicas]

    def served_versions(self) -> set[str | None]:
        """Versions of the weights that the replicas served when last heard of (``wait_reachable`` asks all)."""
        return {replica.version for replica in self._pool.replicas}

    def server_info(self) -> list[Json]:
        """What each replica says of itself: SGLang's start-up arguments and live state, with ``weight_version``."""
        return self._on_each(self._info)

    def wait_reachable(self) -> None:
        """Wait until every replica answers: one that died is being started again.

        Raises:
            ServerError: one does not, in the time that a restart may take.
        """
        self._pool.wait_reachable()

    def flush_cache(self, wait_s: float = 30.0) -> None:
        """Drop cached prefixes on every replica, waiting so long for running requests to end.

        Asked again and again rather than once with SGLang's own ``timeout``: an idle scheduler sleeps for up to a second
        before it looks at a flush that had to wait (0.5.23), and a request wakes it.

        Raises:
            ServerError: requests are still running.
        """
        deadline = time.monotonic() + wait_s

        def flush(replica: Replica) -> None:
            pause_s = _FLUSH_EVERY_S[0]
            while True:
                try:
                    return self._post(replica, "/flush_cache", None)
                except RefusedError:
                    if time.monotonic() > deadline:
                        raise
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _FLUSH_EVERY_S[1])

        self._on_each(flush)

    def pause(self, mode: Literal["abort", "retract"] = "retract") -> None:
        """Stop drawing tokens on every replica, until ``continue_generation``. New requests wait.

        Args:
            mode: "abort" ends running requests (this client then sends them again); "retract" puts them back in the queue
                with the tokens that they have, whose prefix is computed anew afterwards. A response that goes on under other
                weights is a sample only for who asked for weights ``SinceVersion``; else it is drawn anew.
        """
        self._post_all("/pause_generation", {"mode": mode})

    def continue_generation(self) -> None:
        """End a ``pause`` on every replica."""
        self._post_all("/continue_generation", {})

    def update_weights_from_disk(self, path: str | os.PathLike[str], version: str, *, in_flight: bool = False) -> None:
        """Load other weights of the same architecture on every replica, and make sure that every one did.

        The directory is checked before a server sees it.

        Args:
            path: Hugging Face directory that every server can read at this path.
            version: label of the new weights; later replies carry it.
            in_flight: running requests are paused and go on under the new weights; by default they end first.

        Raises:
            CheckpointError: the directory is incomplete, or holds another model's tensors. Nothing was sent.
            ServerError: a replica did not load them. Its weights are then unknown: send them again before using it.
        """
        model_dir = Path(path).absolute()
        if self._served_tensors is None:  # of the weights it started with: later directories may be gone by now
            served_dir = Path(self._info(self._pool.replicas[0])["model_path"])
            self._served_tensors = tensor_names(served_dir if served_dir.is_dir() else model_dir)
        require_same_tensors(model_dir, self._served_tensors)
        # SGLang's scheduler may hold a request for a moment after its last token was answered, and then loads the weights but
        # refuses the update, since it could not drop the cached prefixes. The flush waits until nothing is held.
        if in_flight:
            self.pause()
        self.flush_cache(self._control_timeout_s / 2)
        self._post_all(
            "/update_weights_from_disk",
            {"model_path": str(model_dir), "weight_version": version, "flush_cache": True},
        )
        self.require_weight_version(version)
        if in_flight:
            self.continue_generation()

    def require_weight_version(self, version: str) -> None:
        """Make sure that every replica serves this version of the weights.

        Raises:
            ServerError: one of them does not.
        """
        for replica, info in zip(self._pool.replicas, self.server_info(), strict=True):
            replica.version = info["weight_version"]
            if info["weight_version"] != version:
                raise ServerError(
                    f"{replica.url} = weight version {info['weight_version']!r}, expected {version!r}: the update did not "
                    "reach it, or it was restarted. Send the weights again to all replicas."
                )

    def init_weights_group(
        self,
        master_address: str,
        master_port: int,
        *,
        group_name: str,
        backend: Literal["nccl", "gloo"],
        ranks_per_replica: int = 1,
    ) -> Future[list[None]]:
        """Let the servers join a process group in which the trainer, rank 0, will broadcast weights.

        World size is ``1 + len(urls) * ranks_per_replica``; replica i holds the ranks after those of replica i - 1.

        Returns:
            Done when all have joined. That takes the trainer joining too, so start it, join, then wait for it.
        """

        def join(replica: Replica) -> None:
            index = self._pool.replicas.index(replica)
            self._post(
                replica,
                "/init_weights_update_group",
                {
                    "master_address": master_address,
                    "master_port": master_port,
                    "rank_offset": 1 + index * ranks_per_replica,
                    "world_size": 1 + len(self._pool.replicas) * ranks_per_replica,
                    "group_name": group_name,
                    "backend": backend,
                },
            )

        return in_background(self._on_each, join)

    def begin_weight_update(self) -> None:
        """Open the session in which ``update_weights_from_distributed`` may be called. ``pause`` first: SGLang would
        answer requests between two buckets with weights of both versions. A session that a failed update left is closed."""

        def begin(replica: Replica) -> None:
            try:
                self._post(replica, "/begin_weight_update", {})
            except RefusedError:
                self._post(replica, "/end_weight_update", {})
                self._post(replica, "/begin_weight_update", {})

        self._on_each(begin)

    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        *,
        group_name: str,
        version: str,
    ) -> Future[None]:
        """Announce one bucket of tensors that the trainer is about to broadcast.

        The bucket is one uint8 tensor: the tensors' bytes one after the other in this order, each starting at a multiple of
        its item size (so wider types come first).

        Args:
            names: Hugging Face names.
            dtypes: "float32", "bfloat16", ...
            shapes: full shapes, not shards.
            group_name: as in ``init_weights_group``.
            version: label of the new weights.

        Returns:
            Done when all replicas hold the bucket. Start it, broadcast, then wait for it. If it fails, the weights are a
            mixture: keep the servers paused and send every bucket again.
        """
        bucket = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": True,
            "weight_version": version,
        }
        return in_background(self._post_all, "/update_weights_from_distributed", bucket)

    def end_weight_update(self) -> None:
        """Close the session. Then ``require_weight_version`` and ``continue_generation``."""
        self._post_all("/end_weight_update", {})

    def destroy_weights_group(self, group_name: str) -> Future[None]:
        """Let the servers leave the process group. Leave it on the other side before waiting for this: NCCL's farewell takes
        both."""
        return in_background(self._post_all, "/destroy_weights_update_group", {"group_name": group_name})

    def _info(self, replica: Replica) -> Json:
        info = self._pool.control(replica, "GET", "/server_info", None, self._control_timeout_s)
        # A weight update moves these two, which /server_info goes on reporting as they were at the start.
        live = self._pool.control(replica, "GET", "/model_info", None, self._control_timeout_s)
        return info | {key: live[key] for key in ("model_path", "weight_version")}

    def _post(self, replica: Replica, path: str, body: Json | None) -> None:
        reply = self._pool.control(replica, "POST", path, body, self._control_timeout_s)
        if reply.get("success") is False:
            raise RefusedError(f"{replica.url}{path} = {reply.get('message')}: it failed. Send all weights again.")

    def _post_all(self, path: str, body: Json | None) -> None:
        self._on_each(lambda replica: self._post(replica, path, body))

    def _on_each[T](self, act: Callable[[Replica], T]) -> list[T]:
        """Act on all replicas at once; the first failure is raised when it happens, while the others go on alone."""
        futures = [in_background(act, replica) for replica in self._pool.replicas]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]


def in_background[T](act: Callable[..., T], *arguments: object) -> Future[T]:
    """Run in a daemon thread (an executor's are not): a collective that nobody joins must not keep the program alive."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(act(*arguments))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="sglang-control", daemon=True).start()
    return done
