"""The bash of a Slurm job: what its batch script does around the roles, and what each task runs.

In: a profile, a role's nodes, the run folders. Out: text, for NeMo-Run to submit. A script names its run by a variable, which
the batch script sets: the same scripts serve one run, and every run of an array that lies alike on the nodes.
"""

import os
import shlex
from collections.abc import Mapping

from megatron_distill.launch.endpoints import HOSTS_VARIABLE
from megatron_distill.launch.launch import ROLE_ENV, ROLES_MODULE
from megatron_distill.launch.nodes import ClusterProfile, Group
from megatron_distill.runs.run_folder import RunFolder

RUN_VARIABLE = "MEGATRON_DISTILL_RUN"
"""The run's folder, in the environment of every task."""

_STOP, _IGNORE = "'touch \"$run\"/stop_requested'", "''"  # what a warning does: bash, quoted


def task_script(group: Group, profile: ClusterProfile) -> str:
    """Bash that every task of a group runs, on its node or in its container."""
    interfaces = [f"{name}_SOCKET_IFNAME" for name in ("GLOO", "NCCL", "TP")] if profile.socket_interface else []
    variables = ROLE_ENV | dict.fromkeys(interfaces, profile.socket_interface) | dict(profile.env)
    python = shlex.quote(profile.interpreter)
    slots = group.slots_per_task
    gpus: list[str] = []
    if group.role == "run":
        command, log = f'{python} -m megatron_distill.launch.cluster "$run"', "run.out"
    elif group.role == "trainer":
        torchrun = (
            f"-m torch.distributed.run --nnodes={group.num_nodes} --nproc-per-node={slots} "
            '--node-rank="$SLURM_NODEID" --master-addr="$TRAINER_HOST" --master-port="$TRAINER_PORT"'
        )
        command = f'{python} {torchrun} \\\n  -m {ROLES_MODULE} trainer "$run"'
        log = 'trainer-"$SLURM_NODEID".out'
    else:
        command = f'{python} -m {ROLES_MODULE} {group.role}-server "$run" --index "$SLURM_PROCID"'
        log = f'{group.role}-"$SLURM_PROCID".out'
        if profile.gpus_per_node:
            command += " --device cuda"
            first = f"SLURM_LOCALID * {slots}"
            gpus = [f'export CUDA_VISIBLE_DEVICES="$(seq -s, $(({first})) $(({first} + {slots - 1})))"']
    lines = [
        f'run="${RUN_VARIABLE}"',
        f"cd {shlex.quote(os.getcwd())} || exit 1  # where the recipe's relative paths are meant from",
        *(
            ["unset PYTHONPATH  # the submitting host's would hide the image's packages"]
            if profile.container_image
            else []
        ),
        *(["export PYTHONNOUSERSITE=1"] if profile.container_image else []),
        *profile.setup,
        "set -u",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        *gpus,
        "# Where processes are tracked by cgroups, Slurm's signals reach this shell alone: it stays, and passes them on.",
        "# The warning before the time limit is for the trainer, which looks for the file after each step.",
        f"trap {_STOP if group.role in ('trainer', 'run') else _IGNORE} USR1",
        f'{command} >> "$run"/logs/{log} 2>&1 &',
        "role=$!",
        "trap 'kill -TERM \"$role\"' TERM",
        'while wait "$role"; kill -0 "$role" 2>/dev/null; do :; done  # a signal ends a wait too',
    ]
    if group.role not in ("trainer", "run"):
        lines.append("exit 1  # a server that ends before the trainer has failed, however politely")
    else:
        lines.append('wait "$role"; exit $?  # the shell remembers how it ended')
    return "\n".join(lines) + "\n"


def run_of_job(folder: RunFolder) -> str:
    """Lines of the batch script: which run it is, and what Slurm calls its job."""
    return f'{RUN_VARIABLE}={shlex.quote(str(folder.root))}\njob="$SLURM_JOB_ID"'


def run_of_task(folders: Mapping[int, RunFolder]) -> str:
    """The same in a job array: each task, by its number, is a run."""
    cases = (
        f"    {number}) {RUN_VARIABLE}={shlex.quote(str(folder.root))} ;;" for number, folder in sorted(folders.items())
    )
    # By its own id, which one task shares with the array, Slurm would requeue all of them.
    return "\n".join(
        ('case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac", 'job="$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"')
    )


def batch_setup(profile: ClusterProfile, which_run: str) -> str:
    """Lines of the batch script, which runs on the trainer's first node: a clean start, an address, and going on.

    A requeued job runs the same script again, so what an earlier start left about its end is moved out of the way first.

    Args:
        profile: says how often a job goes on.
        which_run: what ``run_of_job`` or ``run_of_task`` wrote.
    """
    return f"""
{which_run}
export {RUN_VARIABLE}
run="${RUN_VARIABLE}"

# A requeued job starts here again: forget how the start before it ended, but keep why.
past="$run"/launch/failures/"$SLURM_JOB_ID"-"${{SLURM_RESTART_COUNT:-0}}"
mkdir -p "$past" && mv "$run"/errors/*.json "$past"/ 2>/dev/null
rmdir "$past" 2>/dev/null
rm -rf "$run"/finished.json "$run"/stop_requested "$run"/endpoints "$run"/sync
[ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] || rm -f "$run"/launch/failed_starts

# The trainer's ranks meet on this node, at a port that nobody answers on, where no server looks for its own. Its processes, and
# those of all the job's nodes, find their own addresses on the way to one another.
export TRAINER_HOST="$(uname -n)" TRAINER_PORT
for TRAINER_PORT in $(shuf --input-range=20000-21999 --head-count=20); do
    (exec 3<>"/dev/tcp/127.0.0.1/$TRAINER_PORT") 2>/dev/null || break
done
export {HOSTS_VARIABLE}="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -s -d ,)"

# Whether to go on: after the time limit if there is a new checkpoint; after a failure if it is not the last that is allowed.
saved_step() {{ cat "$run"/checkpoints/latest_checkpointed_iteration.txt 2>/dev/null || echo 0; }}
step_at_start=$(saved_step)
failed_starts() {{ cat "$run"/launch/failed_starts 2>/dev/null || echo 0; }}
go_on() {{
    [ ! -e "$run"/finished.json ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {profile.max_requeues} ] || return
    if [ "$(saved_step)" -gt "$step_at_start" ]; then
        echo 0 > "$run"/launch/failed_starts
    elif [ -z "$(ls "$run"/errors)" ]; then
        return  # no step was saved, and nothing is known to be wrong: stopped by its user, or too short a time limit
    fi
    if [ -n "$(ls "$run"/errors)" ]; then
        echo $(($(failed_starts) + 1)) > "$run"/launch/failed_starts
        [ "$(failed_starts)" -lt {profile.max_failed_starts} ] || return
    fi
    # A job that its user cancels may have saved a step too, but to Slurm it is not incomplete, and it stays down. One that was
    # warned may be over its time by now.
    if [ -e "$run"/stop_requested ]; then scontrol requeue "$job"; else scontrol requeue Incomplete "$job"; fi
}}
end() {{
    go_on || :
    # What waits for this job goes by how it ends, and that is how the run did.
    if [ -e "$run"/finished.json ]; then exit 0; else exit 1; fi
}}
trap end EXIT
"""
