"""What `--gpus` may say, and which device it means."""

import json
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofit.errors import InputError
from autofit.sources.detect import num_gpus_here
from autofit.sources.gpus import catalogue, fold
from autofit.sources.hardware import parse_cluster
from autofit.units import GIB, MIB

ROWS = json.loads(resources.files("autofit.sources").joinpath("data/gpus.json").read_text(encoding="utf-8"))
CUDA_ROWS = [row for row in ROWS["gpus"] if row["platform"] == "cuda"]


@pytest.mark.parametrize(
    ("text", "num_nodes", "num_devices_per_node", "name"),
    [
        ("2xA100-80G", 1, 2, "A100-SXM-80G"),
        ("A100-80G", 1, 1, "A100-SXM-80G"),
        ("4x8xH100-80G", 4, 8, "H100-SXM-80G"),
        ("2xRTX4090-24G", 1, 2, "RTX4090-24G"),
        ("8xA100-40G", 1, 8, "A100-SXM-40G"),
        ("a100-pcie-80gb", 1, 1, "A100-PCIe-80G"),
        ("T4-16G", 1, 1, "T4-16G"),
        ("H100", 1, 1, "H100-SXM-80G"),
        ("  2 X rtx_4090 24 GB ", 1, 2, "RTX4090-24G"),
        ("2x2080Ti", 1, 2, "RTX2080Ti-11G"),
        ("V100-32G", 1, 1, "V100-SXM2-32G"),
        ("NVIDIA A100-SXM4-40GB", 1, 1, "A100-SXM-40G"),
    ],
)
def test_names_are_read_as_people_write_them(text, num_nodes, num_devices_per_node, name):
    """Counts may be left out, and case, dashes, spaces and underscores do not matter."""
    cluster = parse_cluster(text)
    found = (cluster.num_nodes, cluster.num_devices_per_node, cluster.device.name)
    assert found == (num_nodes, num_devices_per_node, name)


def test_an_a100_is_what_torch_says_it_is():
    """Torch sees 81251 of the 81920 MiB of an 80G A100 (79.35 GiB in its own messages), Ampere, 312 bf16 TFLOPS."""
    device = parse_cluster("A100-80G").device
    assert device.memory_bytes == 81251 * MIB
    assert f"{device.memory_bytes / GIB:.2f}" == "79.35"
    assert not device.memory_is_estimated
    assert (device.compute_capability, device.computes_bf16) == ((8, 0), True)
    assert (device.bf16_flops_per_second, device.memory_bytes_per_second) == (312e12, 2039e9)
    assert device.peer_bytes_per_second == 300e9


@pytest.mark.parametrize(
    ("name", "capability", "computes_bf16"),
    [("T4", (7, 5), False), ("V100-16G", (7, 0), False), ("B200", (10, 0), True), ("RTX5090", (12, 0), True)],
)
def test_bfloat16_begins_with_ampere(name, capability, computes_bf16):
    """Volta and Turing multiply no bfloat16; everything since compute capability 8.0 does."""
    device = parse_cluster(name).device
    assert (device.compute_capability, device.computes_bf16) == (capability, computes_bf16)


@pytest.mark.parametrize("row", CUDA_ROWS, ids=lambda row: row["name"])
def test_every_row_is_reached_by_its_own_name_and_has_a_source(row):
    """Each row's name means that row, its usable memory is below its label, and its sources are named."""
    device = parse_cluster(row["name"]).device
    assert device.name == row["name"]
    assert 0.9 * row["label_gb"] * GIB < device.memory_bytes <= row["label_gb"] * GIB
    assert row["sources"]
    assert device.compute_capability


@pytest.mark.parametrize("row", CUDA_ROWS, ids=lambda row: row["name"])
def test_every_row_is_detected_by_the_name_its_driver_prints(row):
    """`auto` finds each row by what nvidia-smi prints for it, planning for what is free."""
    for reported in row["reported_names"]:
        total_mib = row["nvidia_smi_mib"] or row["label_gb"] * 1024
        answer = f"0, GPU-1a2b, {reported}, {total_mib}, 9000, {row['figures']['compute_capability']}\n"
        device = parse_cluster("auto", detect=lambda answer=answer: answer, environment={}).device
        assert (device.name, device.memory_bytes) == (row["name"], 9000 * MIB)


def test_no_two_rows_share_a_complete_name():
    """A name with its memory size means one GPU."""
    for row in ROWS["gpus"]:
        for alias in row["aliases"]:
            sized = f"{alias}-{row['label_gb']}G"
            assert len(catalogue().called(sized)) == 1 or alias.endswith("G"), sized


def test_a_derived_memory_is_never_above_a_published_ratio():
    """Where torch's figure is not published, the derived one is the least that any published pair implies."""
    ratios = [
        row["figures"]["usable_mib"] / row["nvidia_smi_mib"]
        for row in CUDA_ROWS
        if row["usable_from"] == "torch" and row["nvidia_smi_mib"]
    ]
    derived = [row for row in CUDA_ROWS if row["usable_from"].startswith("nvidia-smi")]
    assert len(ratios) >= 5
    assert len(derived) >= 10
    assert all(row["figures"]["usable_mib"] / row["nvidia_smi_mib"] <= min(ratios) for row in derived)
    assert all(parse_cluster(row["name"]).device.memory_is_estimated for row in derived)


@given(st.sampled_from(CUDA_ROWS), st.text(alphabet="-_ ", max_size=3), st.booleans())
def test_spelling_does_not_matter(row, separator, upper):
    """Any separators and any case mean the same GPU."""
    text = separator.join(row["name"].split("-"))
    assert parse_cluster(text.upper() if upper else text.lower()).device.name == row["name"]


def test_fold_keeps_what_matters():
    """GB and G are one unit; a letter more is another name."""
    assert fold("A100-80GB") == fold("a100 80g")
    assert fold("L40") != fold("L40S")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("A100", "A100-40G, A100-80G"),
        ("2xA100-60G", "A100-40G, A100-80G"),
        ("A10O-80G", "A100-80G"),
        ("RTX4O90", "4090-24G"),
        ("0xA100-80G", "0 devices"),
        ("-2xA100-80G", "-2 devices"),
        ("2x0xA100-80G", "0 devices"),
        ("", "empty"),
        ("   ", "empty"),
        ("CPU", "CPU-8G"),
        ("2xCPU-0G", "CPU-8G"),
        ("CPU-8X", "not a known GPU"),
        ("MI300X", "no measured memory model for ROCM"),
        ("Gaudi2-96G", "no measured memory model for HPU"),
        ("A100-80G:bf16_tflop=3", "'bf16_tflop'"),
        ("A100-80G:bf16_tflops=many", "not a positive number"),
        ("A100-80G:bf16_tflops=-3", "not a positive number"),
        ("A100-80G:bf16_tflops", "KEY=VALUE"),
        ("New-48G:compute_capability=ampere", "compute capability"),
        ("New:bf16_tflops=100", "memory is not given"),
        ("2xauto", "counts the devices itself"),
        ("missing.yaml", "No such file"),
        ("A100\n80G'\"", "not a known GPU"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_could_be(text, says):
    """A refusal is an InputError (exit code 2) that names the alternatives."""
    with pytest.raises(InputError) as refusal:
        parse_cluster(text)
    assert says in str(refusal.value)
    assert refusal.value.to_fix
    assert refusal.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "memory_bytes"),
    [("2xCPU-8G", 8 * GIB), ("2xcpu-1.5GiB", 3 * GIB // 2), ("2xCPU8GB", 8 * 10**9), ("2xCPU-1M", MIB)],
)
def test_a_cpu_rank_is_a_budget(text, memory_bytes):
    """A CPU rank has the bytes that were given, no caching allocator, and no speed until it is measured."""
    cluster = parse_cluster(text)
    assert (cluster.num_devices, cluster.device.kind, cluster.device.memory_bytes) == (2, "cpu", memory_bytes)
    assert cluster.device.bf16_flops_per_second is None
    assert cluster.device.dollars_per_hour is None


def test_a_new_gpu_is_described_in_place():
    """Figures that are given are used, those that are not stay unknown, and the label is read cautiously."""
    cluster = parse_cluster("4xMyGPU-48G:bf16_tflops=180,bandwidth_gb_s=900,inter_node_gb_s=25,host_memory_gib=512")
    device = cluster.device
    assert (device.name, cluster.num_devices) == ("MyGPU-48G", 4)
    assert (device.bf16_flops_per_second, device.memory_bytes_per_second) == (180e12, 900e9)
    assert device.peer_bytes_per_second is None
    assert device.computes_bf16
    assert device.memory_is_estimated
    assert 0.9 * 48 * GIB < device.memory_bytes < 48 * GIB
    assert (cluster.inter_node_bytes_per_second, cluster.host_memory_bytes) == (25e9, 512 * GIB)


def test_a_known_gpu_takes_the_users_figures():
    """Two bridged RTX 3090 are faster peers than PCIe makes them; everything else stays the catalogue's."""
    plain, bridged = parse_cluster("2x3090").device, parse_cluster("2x3090:peer_gb_s=56.25").device
    assert plain.peer_bytes_per_second < bridged.peer_bytes_per_second == 56.25e9
    assert plain.memory_bytes == bridged.memory_bytes


def test_a_new_gpu_is_described_in_a_file(tmp_path):
    """The same keys in YAML mean the same, wherever the file lies."""
    path = tmp_path / 'it\'s a "GPU"\n.yaml'
    path.write_text("name: MyGPU\nusable_mib: 47000\ncompute_capability: 8.9\nbf16_tflops: 180\n", encoding="utf-8")
    cluster = parse_cluster(f"2x{path}")
    assert cluster.num_devices == 2
    assert cluster.device.memory_bytes == 47000 * MIB
    assert cluster.device.compute_capability == (8, 9)
    assert not cluster.device.memory_is_estimated


@pytest.mark.parametrize(
    "content", ["", "[]", "name: [", "name: X", "name: X\nlabel_gb: -3", "name: X\nlabel_gb: 24\nspeed: 9", "\x00"]
)
def test_a_file_that_describes_no_gpu_is_refused(tmp_path, content):
    """Broken YAML, missing names and unknown keys are the caller's to correct."""
    path = tmp_path / "gpu.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as refusal:
        parse_cluster(str(path))
    assert str(path) in str(refusal.value)


TWO_A100 = (
    "0, GPU-aaaa, NVIDIA A100-SXM4-80GB, 81920, 81042, 8.0\n1, GPU-bbbb, NVIDIA A100-SXM4-80GB, 81920, 40000, 8.0\n"
)
MIXED = TWO_A100 + "2, GPU-cccc, NVIDIA L4, 23034, 22500, 8.9\n"


@pytest.mark.parametrize(
    ("environment", "num_devices", "free_mib"),
    [
        ({}, 2, 40000),
        ({"CUDA_VISIBLE_DEVICES": "0"}, 1, 81042),
        ({"CUDA_VISIBLE_DEVICES": "GPU-bbbb"}, 1, 40000),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,0"}, 1, 40000),
    ],
)
def test_auto_plans_against_the_least_free_memory_of_what_is_visible(environment, num_devices, free_mib):
    """CUDA_VISIBLE_DEVICES is honoured as CUDA does: by index or UUID, up to the first entry that is none."""
    cluster = parse_cluster("AUTO", detect=lambda: TWO_A100, environment=environment)
    assert (cluster.num_devices, cluster.device.name) == (num_devices, "A100-SXM-80G")
    assert cluster.device.memory_bytes == free_mib * MIB


@pytest.mark.parametrize(
    ("answer", "environment", "says"),
    [
        (MIXED, {}, "CUDA_VISIBLE_DEVICES=0,1"),
        (TWO_A100, {"CUDA_VISIBLE_DEVICES": ""}, "hides 2"),
        (TWO_A100, {"CUDA_VISIBLE_DEVICES": "7"}, "2xCPU-8G"),
        (TWO_A100, {"CUDA_VISIBLE_DEVICES": "MIG-1234"}, "MIG"),
        ("", {}, "2xCPU-8G"),
        ("0, GPU-a, NVIDIA GeForce RTX 3080, 12288, 12000, 8.6\n", {}, "GeForceRTX3080-12G"),
        ("0, GPU-a, NVIDIA GB10, [N/A], [N/A], 12.1\n", {}, "no memory figures"),
        ("No devices were found\n", {}, "no memory figures"),
    ],
)
def test_auto_refuses_what_it_cannot_plan_for(answer, environment, says):
    """Unequal, hidden, unlisted and unreadable GPUs are each refused with what to write instead."""
    with pytest.raises(InputError) as refusal:
        parse_cluster("auto", detect=lambda: answer, environment=environment)
    assert says in str(refusal.value)


def test_gpus_are_counted_as_a_process_would_see_them(monkeypatch, tmp_path):
    """nvidia-smi's lines that CUDA_VISIBLE_DEVICES leaves; none without a device file; else it is not known."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "nvidia0").touch()
    assert num_gpus_here({}, devices=tmp_path) is None
    assert num_gpus_here({}, devices=tmp_path / "none") == 0
    lines = "\n".join(f"{n}, GPU-{n}, NVIDIA A100-SXM4-80GB, 81920, 81000, 8.0" for n in range(4))
    program.write_text(f"#!/bin/sh\necho '{lines}'\n")
    program.chmod(0o755)
    assert num_gpus_here({}) == 4
    assert num_gpus_here({"CUDA_VISIBLE_DEVICES": "2,3"}) == 2
    assert num_gpus_here({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert num_gpus_here({"CUDA_VISIBLE_DEVICES": "MIG-1"}) is None
    program.write_text("#!/bin/sh\nexit 9\n")
    assert num_gpus_here({}, devices=tmp_path / "none") is None


def test_auto_without_nvidia_smi_suggests_cpu_ranks(monkeypatch, tmp_path):
    """On a machine without a GPU the message says how to train anyway."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="2xCPU-8G"):
        parse_cluster("auto")
