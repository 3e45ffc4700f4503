"""Memory that the process may still take, inside control groups too."""

from lmtp_factory.decoding.free_memory import free_in_cgroup


def test_memory_left_in_control_groups(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    assert free_in_cgroup(tmp_path, membership) is None
    write_group(tmp_path / "outer/inner", "max", 300, 0, version=2)
    assert free_in_cgroup(tmp_path, membership) is None
    write_group(tmp_path / "outer", 1000, 700, 50, version=2)
    assert free_in_cgroup(tmp_path, membership) == 350
    write_group(tmp_path / "outer/inner", 500, 300, 0, version=2)
    assert free_in_cgroup(tmp_path, membership) == 200


def test_memory_left_where_a_container_names_its_group_as_the_host_does(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("4:cpu,memory:/docker/0123\n0::/\n")
    write_group(tmp_path / "memory", 900, 800, 100, version=1)
    assert free_in_cgroup(tmp_path, membership) == 200
    write_group(tmp_path / "memory", 900, 1200, 100, version=1)
    assert free_in_cgroup(tmp_path, membership) == 0


def write_group(folder, limit, used, inactive, version):
    folder.mkdir(parents=True, exist_ok=True)
    names = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    prefix = "" if version == 2 else "total_"
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {inactive}\n")
