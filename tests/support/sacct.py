"""``sacct`` for a lab without an accounting database: jobs that the controller remembers, as ``sacct --parsable2`` prints them.

Knows the options that the launcher and NeMo-Run use: ``-j ID`` or ``--jobs=ID``, ``--format=``, ``--noheader``.
"""

import argparse
import re
import subprocess

# What the real one calls it, and where `scontrol show job` has it.
FIELDS = {"JobID": "JobId", "JobName": "JobName", "Partition": "Partition", "Account": "Account", "AllocCPUS": "NumCPUs",
          "State": "JobState", "ExitCode": "ExitCode"}  # fmt: skip


def main() -> None:
    """Print one line for each task of the job, which is one unless it is an array."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-j", "--jobs", required=True)
    parser.add_argument("--format", default=",".join(FIELDS))
    parser.add_argument("-n", "--noheader", action="store_true")
    parser.add_argument("-X", "--allocations", action="store_true")  # there are no steps here anyway
    parser.add_argument("-P", "--parsable2", action="store_true")
    options = parser.parse_args()
    columns = options.format.split(",")
    if not options.noheader:
        print("|".join(columns))
    shown = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", options.jobs], capture_output=True, text=True, check=False
    )
    for line in shown.stdout.splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        if "ArrayTaskId" in facts:
            facts["JobId"] = f"{facts['ArrayJobId']}_{facts['ArrayTaskId']}"
        if facts.get("JobState") == "COMPLETING":
            facts["JobState"] = "RUNNING"
        print("|".join(facts.get(FIELDS[column], "") for column in columns))


if __name__ == "__main__":
    main()
