"""The sweeps of the tests' W&B server: they give the values that a test has chosen."""

import json
from collections import deque

import yaml


class WandbSweeps:
    """``values`` are the parameters of the next runs, in order; after them, agents get "exit"."""

    def __init__(self):
        self.values = deque()
        self.configs = {}
        """By id of the sweep."""
        self.agents = {}
        """By id the host, the sweep, and the runs that the agent has reported."""
        self.given = []
        """The runs that were given: id, values, and the agent's id."""
        self.stops = set()
        """Runs whose agent is told to stop them."""

    def answer(self, operation, variables, project):
        """The data of a GraphQL operation; None for one that is not about sweeps."""
        if operation == "UpsertSweep":
            name = f"sweep{len(self.configs)}"
            self.configs[name] = yaml.safe_load(variables["config"])
            sweep = {"name": name, "project": project}
            return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}
        if operation == "CreateAgent":
            if variables["sweep"] not in self.configs:
                raise ValueError(f"there is no sweep {variables['sweep']}")
            name = f"agent{len(self.agents)}"
            self.agents[name] = {**variables, "runs": []}
            return {"createAgent": {"agent": {"id": name}}}
        if operation == "Heartbeat":
            commands = json.dumps(
                self._commands(variables["id"], json.loads(variables["runState"]))
            )
            agent = {"id": variables["id"]}
            return {"agentHeartbeat": {"agent": agent, "commands": commands}}
        return None

    def _commands(self, agent, runs):
        self.agents[agent]["runs"] += runs
        stopped = [{"type": "stop", "run_id": run} for run in runs if run in self.stops]
        if stopped or runs:
            return stopped
        if not self.values:
            return [{"type": "exit"}]
        run, values = f"run{len(self.given)}", self.values.popleft()
        self.given.append((run, values, agent))
        arguments = {name: {"value": value} for name, value in values.items()}
        return [{"type": "run", "run_id": run, "args": arguments}]
