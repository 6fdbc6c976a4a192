"""The main job on a running cluster:

    ray job submit --working-dir . -- python jobs/run_rcs.py --config my.yaml --set generation.num_candidates=16

It joins the cluster that runs the job (RAY_ADDRESS is set there; elsewhere, the one that `ray start --head` left on this
machine), runs every stage of the configuration, and leaves the cluster as it was. Submitted again with the same
configuration it goes on where it stopped; `output` must be a folder or URI that every node reaches.
"""

import argparse
import os
import sys

import rc_ray


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, or embedded:demo")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override one value")
    options = parser.parse_args()
    # Reward functions of your own are found in the folder that the job runs in.
    sys.path.append(os.getcwd())
    try:
        # 1. The configuration is validated before anything is asked of the cluster.
        config = rc_ray.load_config(options.config, ["cluster.address=auto", *options.overrides])
        # 2. Sample, score, select, train, evaluate, report; each stage skips what is committed already.
        rc_ray.run(config, emit=lambda line: print(line, flush=True))
    except rc_ray.RcRayError as error:
        print(f"run_rcs: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
