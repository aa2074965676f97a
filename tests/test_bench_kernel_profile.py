"""Kernels by what they are for, and a real profile on the CPU."""

from __future__ import annotations

import pytest
import torch

from tetris.bench.kernel_profile import KernelProfile, kind_of, profile_kernels


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("gather_rows_kernel", "permutation"),
        ("permute_rows_kernel", "permutation"),
        ("void at::native::indexSelectLargeIndex<c10::Half>", "permutation"),
        ("stem_conv2d_kernel", "stem"),
        ("conv2d_kernel", "block-sparse"),
        ("block_sparse_linear_kernel", "block-sparse"),
        ("linear_decode_kernel", "block-sparse"),
        ("triton_poi_fused__unsafe_index_convolution_relu_0", "pointwise"),
        ("triton_poi_fused__adaptive_avg_pool2d__unsafe_view_block_sparse_linear_clone_0", "pointwise"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "library"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT", "library"),
        ("Memset (Device)", "other"),
    ],
)
def test_kernels_are_sorted_by_name(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_a_profile_says_where_the_time_goes() -> None:
    profile = KernelProfile({"gather_rows_kernel": (1, 1.0), "conv2d_kernel": (13, 99.0)})
    assert profile.total_us == 100 and profile.share("permutation") == 0.01 and profile.share("stem") == 0.0
    lines = str(profile).splitlines()
    assert "conv2d_kernel" in lines[2] and "99.0%" in lines[2] and lines[-1].startswith("100.0 us: block-sparse 99.0%")
    assert KernelProfile({}).share("permutation") == 0.0


def test_operators_of_a_real_run() -> None:
    x, weight, order = torch.randn(256, 256), torch.randn(256, 256), torch.randperm(256)
    profile = profile_kernels(lambda: torch.relu(x.index_select(1, order) @ weight), "cpu")
    assert 0 < profile.share("permutation") < 1 and profile.share("library") > 0
    assert profile.kernels["aten::relu"][0] == 1
