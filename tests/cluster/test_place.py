"""Which process of a group this is: from flags, from Slurm, from a LeaderWorkerSet."""

import pytest

from jaxinfer import config
from jaxinfer.cli.cluster import find_place
from jaxinfer.cluster.place import PREFIXES, Place, detect, devices_each, first_node, local
from jaxinfer.cluster.secret import find_key
from jaxinfer.config import Config
from jaxinfer.edge_config import ClusterConfig
from jaxinfer.errors import ConfigError
from jaxinfer.settings import variables

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_STEP_NODELIST": "gpu[08-11]",
    "SLURM_JOB_NODELIST": "gpu[06-11]",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu08", "gpu08"),
        ("gpu[08-11,20],cpu3", "gpu08"),
        ("gpu[3,5-7]", "gpu3"),
        ("login-1,gpu2", "login-1"),
        ("a.example.org,b", "a.example.org"),
    ],
)
def test_the_first_node_of_a_slurm_list(nodes, first):
    assert first_node(nodes) == first


def test_slurm_says_the_rank_and_the_share_of_the_nodes_devices():
    assert detect(SLURM) == Place((5,), 8, "gpu08", first_here=1, num_here=2, launcher="Slurm")
    uneven = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,2(x2),1", "SLURM_NODEID": "3"}
    assert detect(uneven).num_here == 1


def test_on_one_slurm_node_the_leader_is_loopback():
    one = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0"}
    assert detect(one) == Place((5,), 8, "127.0.0.1", first_here=1, num_here=8, launcher="Slurm")


def test_in_a_batch_script_itself_nothing_is_guessed():
    script = {name: text for name, text in SLURM.items() if "STEP" not in name}
    with pytest.raises(ConfigError, match="srun"):
        detect(script)


def test_a_leader_worker_set_says_its_three_numbers():
    variables = {
        "LWS_LEADER_ADDRESS": "serve-0.serve.default",
        "LWS_GROUP_SIZE": "4",
        "LWS_WORKER_INDEX": "3",
    }
    assert detect(variables) == Place((3,), 4, "serve-0.serve.default", launcher="LeaderWorkerSet")
    with pytest.raises(ConfigError, match="LWS_GROUP_SIZE is 'four'"):
        detect(variables | {"LWS_GROUP_SIZE": "four"})


def test_without_a_launcher_nothing_is_found_and_the_error_says_what_to_give():
    assert detect({}) is None
    with pytest.raises(ConfigError, match="go together"):
        find_place(None, 1, 4, None)
    with pytest.raises(ConfigError, match="for one machine"):
        find_place(2, 1, None, None)
    with pytest.raises(ConfigError, match="ranks go from 0"):
        find_place(None, 4, 4, "gpu0")
    assert find_place(None, 1, 4, "gpu0") == Place((1,), 4, "gpu0")


def test_only_variables_of_launchers_are_looked_at(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("LWS_GROUP_SIZE", "2")
    monkeypatch.setenv("OTHER", "x")
    found = variables(*PREFIXES)
    assert {"SLURM_PROCID", "LWS_GROUP_SIZE"} <= set(found) and "OTHER" not in found


def test_one_machine_has_the_whole_group_and_rank_0_first():
    place = local(4)
    assert place.ranks == (0, 1, 2, 3) and place.has_leader and place.is_alone
    assert not Place((2,), 4, "gpu0").has_leader
    with pytest.raises(ConfigError, match="at least 1"):
        local(0)


def test_processes_share_the_devices_of_a_mesh_evenly():
    four = config.load("mesh/tensor-4", environ={})
    assert devices_each(four, 4) == 1 and devices_each(four, 2) == 2
    with pytest.raises(ConfigError, match="can't share evenly"):
        devices_each(four, 3)
    with pytest.raises(ConfigError, match="a group for each replica"):
        devices_each(config.load("mesh/replicas-2", environ={}), 2)
    with pytest.raises(ConfigError, match="snapshot"):
        devices_each(config.load("mesh/tensor-4", "snapshot.path=x", environ={}), 2)


def test_a_group_on_many_machines_needs_a_private_key(tmp_path):
    one, many = local(2), Place((1,), 2, "gpu0")
    assert find_key(ClusterConfig(), one) != find_key(ClusterConfig(), one)
    with pytest.raises(ConfigError, match="cluster.key_file is not set"):
        find_key(ClusterConfig(), many)
    path = tmp_path / "key"
    path.write_text("k" * 43 + "\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="cluster.key_file"):
        find_key(ClusterConfig(key_file=str(path)), many)
    path.chmod(0o600)
    assert find_key(ClusterConfig(key_file=str(path)), many) == find_key(
        ClusterConfig(key_file=str(path)), one
    )
    path.write_text("short")
    with pytest.raises(ConfigError, match="at least 32"):
        find_key(ClusterConfig(key_file=str(path)), many)


@pytest.mark.parametrize(
    "change", ["port=70000", "heartbeat_s=0", "start_limit_s=0", "max_failed_starts=-1"]
)
def test_settings_that_can_not_be_are_refused(change):
    with pytest.raises(ConfigError, match=f"cluster.{change.partition('=')[0]}"):
        config.override(Config(), f"cluster.{change}")
