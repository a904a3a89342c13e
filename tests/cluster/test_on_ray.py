"""Ray as a launcher, with a stand-in for Ray that runs what it is given in this process."""

import json
from types import SimpleNamespace

import pytest

from jaxinfer.cli.cluster import cluster
from jaxinfer.cluster import on_ray
from jaxinfer.errors import ConfigError, GroupError


class LostNode(Exception):
    """What Ray raises where a node went away."""


class StandIn:
    """What on_ray uses of Ray; each task runs where it is asked for."""

    exceptions = SimpleNamespace(RayError=LostNode)

    def __init__(self, statuses, *, num_gpus=0, is_room=True):
        self.statuses, self.num_gpus, self.is_room = list(statuses), num_gpus, is_room
        self.started, self.cancelled, self.bundles, self.removed = [], [], [], []
        self.util = SimpleNamespace(
            placement_group=self._place,
            remove_placement_group=self.removed.append,
            get_node_ip_address=lambda: "node-0",
            scheduling_strategies=SimpleNamespace(PlacementGroupSchedulingStrategy=self._strategy),
        )

    def init(self, *, ignore_reinit_error):
        assert ignore_reinit_error

    def cluster_resources(self):
        return {"CPU": 8.0} | ({"GPU": self.num_gpus} if self.num_gpus else {})

    def remote(self, function):
        return SimpleNamespace(
            options=lambda **how: SimpleNamespace(
                remote=lambda *given: self._task(function, how, given)
            )
        )

    def wait(self, tasks, *, num_returns):
        return tasks[:num_returns], tasks[num_returns:]

    def get(self, task):
        if isinstance(task, Exception):
            raise task
        return task

    def cancel(self, task, *, force):
        assert force
        self.cancelled.append(task)

    def _place(self, bundles, *, strategy):
        assert strategy == "STRICT_SPREAD"
        self.bundles = bundles
        return SimpleNamespace(wait=lambda timeout_s: self.is_room)

    def _strategy(self, placed, *, placement_group_bundle_index):
        return placement_group_bundle_index

    def _task(self, function, how, given):
        assert how["max_retries"] == 0
        if function is not on_ray.run:
            return function(*given)
        self.started.append((how["scheduling_strategy"], how["num_gpus"], *given))
        return self.statuses.pop(0)


def test_each_node_gets_its_rank_the_leaders_address_and_one_key():
    ray = StandIn([0, 0, 0])
    on_ray.launch(ray, 3, 8, ["--model", "m"])
    keys = {key for _, _, key, _ in ray.started}
    assert len(keys) == 1 and len(keys.pop()) == 64
    assert [(rank, arguments) for rank, _, _, arguments in ray.started] == [
        (rank, ["--model", "m", "--rank", str(rank), "--size", "3", "--leader", "node-0"])
        for rank in range(3)
    ]
    assert ray.bundles == [{"CPU": 1}] * 3 and len(ray.cancelled) == 3 and len(ray.removed) == 1


def test_devices_are_asked_for_where_nodes_have_them():
    ray = StandIn([0, 0], num_gpus=16)
    on_ray.launch(ray, 2, 8, [])
    assert ray.bundles == [{"CPU": 1, "GPU": 8}] * 2
    assert [num_gpus for _, num_gpus, _, _ in ray.started] == [8, 8]


def test_a_lost_node_starts_all_again_with_another_key():
    ray = StandIn([LostNode("gone"), 0, 0, 0])
    on_ray.launch(ray, 2, 1, [])
    assert [rank for rank, *_ in ray.started] == [0, 1, 0, 1]
    assert ray.started[0][2] != ray.started[2][2]
    assert len(ray.cancelled) == 4


def test_a_command_that_fails_ends_the_launch():
    ray = StandIn([2, 0])
    with pytest.raises(GroupError, match="ended with 2"):
        on_ray.launch(ray, 2, 1, [])
    assert len(ray.cancelled) == 2 and len(ray.removed) == 1
    with pytest.raises(GroupError, match="no 2 nodes"):
        on_ray.launch(StandIn([], is_room=False), 2, 1, [])


def test_on_a_node_the_key_is_a_private_file_for_the_time_of_the_command(tmp_path, monkeypatch):
    told = tmp_path / "told"
    script = tmp_path / "play"
    script.write_text(
        "import json, os, sys\n"
        "path = sys.argv[sys.argv.index('--cluster.key-file') + 1]\n"
        f"json.dump([sys.argv[1:], path, os.stat(path).st_mode & 0o777, open(path).read()],"
        f" open({str(told)!r}, 'w'))\n"
        "sys.exit(7)\n"
    )
    real = on_ray.subprocess.call
    monkeypatch.setattr(
        on_ray.subprocess,
        "call",
        lambda command: real([*command[:3], str(script), *command[5:]]),
    )
    assert on_ray.run("k" * 64, ["--rank", "0"]) == 7
    words, path, mode, key = json.loads(told.read_text())
    assert words[:3] == ["cluster", "--rank", "0"]
    assert (mode, key) == (0o600, "k" * 64)
    assert not on_ray.Path(path).exists()


def test_without_ray_or_with_places_of_its_own_the_command_says_what_to_do(monkeypatch):
    monkeypatch.setattr(on_ray, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install ray"):
        on_ray.find_ray()
    with pytest.raises(ConfigError, match="leave the other flags out"):
        cluster(ray=2, processes=2)
