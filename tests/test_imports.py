"""What an import costs, what it drags in, and that the public names are there and explained."""

import importlib
import json
import re
import subprocess
import sys
import types

import pytest

METHODS = (
    "linalg", "optim", "init", "theory", "nn", "regularize", "checkpoint", "merge", "diagnose",
    "numerics", "generate", "nn.operators", "nn.lemon", "numerics.sampled",
    "numerics.tensor_product",
)  # fmt: skip
HEAVY = {"torch", "numpy", "scipy", "matplotlib", "jinja2", "sklearn", "transformers", "pandas"}

# What the contract between the parts promises; a home may hold more.
PROMISED = {
    "linalg": "newton_schulz polar cayley inverse_cayley rotation_exp rotation_log skew "
    "procrustes_rotation haar dct idct dct_matrix orthogonality_error ptd_diagonalize",
    "optim": "Muon NorMuon RMNP ROOT AuON HybridAuON ARO Trion DCTAdamW split_parameters "
    "describe_groups race normuon_direction rmnp_direction auon_direction soft_clip "
    "fit_coefficients row_dominance sinkhorn_normalize shifted_cholesky_qr ColumnSelector",
    "init": "shrink_perturb_ shrink_perturb ShrinkPerturb gradient_balance low_rank_init "
    "spectrum_init aligned_init dale_init orthogonal_init_ decoupled_init_ RichFeatures "
    "discovery_sets InvariantHead irmv1 vrex spectral_decoupling iga fishr_linear clove LoGAH "
    "LowRankDecoder graph_from_module",
    "theory": "mode_curve mode_time task_modes critical_gain DeepLinearSimulator effective_rank "
    "LazinessProbe tangent_kernel kernel_alignment CTRNN ntk_relu permutation_moments "
    "ensemble_size PermutationEnsemble",
    "nn": "S4D S4DKernel S4DClassifier S4PTD S5 hippo_legs hippo_ptd associative_scan "
    "OrthogonalConv2d lorth orthogonal_conv_exists poincare operators lemon",
    "nn.operators": "convert report SpectralConv LocalIntegralConv DifferentialConv KernelIntegral "
    "IntegralAttention FunctionNorm resample quadrature InputOutputInterpolation relative_l2 "
    "discretization_error FilteredActivation",
    "nn.lemon": "PROSE PolishTokenizer pde finetune lora merge_lora MetaLearner SymbolicStepSize",
    "generate": "ImageDatabase DCTEncoder proposal_counts top_m RetrievalDenoiser "
    "RetrievalDiffusion frechet_distance precision_recall copy_report",
    "regularize": "OrthogonalityPenalty OrthoReg orthoreg_loss orthoreg_loss_lowrank "
    "lambda_orthogonality LambdaOrthogonality",
    "merge": "orthomerge merge_rotations merge_oft_adapters linear slerp task_arithmetic ties dare "
    "merge TaskVector disentanglement_error select_alpha OrthogonalAdapter add_orthogonal_adapters "
    "merge_adapters crosstalk shared_basis free_slots CompatibleAdapter retrieval_metrics "
    "backfill_order backfill_curve",
    "diagnose": "diagnose Report weibull_fit weibull_fit_counts half_normal_anchor classify_k "
    "training_clock compare_to_reference cosine_moments accepted_deviation capacity min_dimension "
    "worst_case_overlap pack_directions fit_capacity welch_bound ConceptCylinder",
    "numerics": "fit_basis sample_design DPPLeastSquares LegendreDPP HermiteDPP "
    "OnlineOrthogonalDictionary fw_step recovery_error sor_solve ssor_pcg TsallisINF ChebCB "
    "RelaxedSolver sampled tensor_product",
    "numerics.sampled": "SampledMatrix SampledVector combine sketch svt lowrank SampledPCA "
    "SampledLowRankRegressor SampledRecommender",
    "numerics.tensor_product": "axis_apply KroneckerOperator KroneckerSum grid1d "
    "FastDiagonalization poisson_solve compact_derivative BandedLineSolver ADIHeat sum_factorize "
    "PencilGrid",
    "checkpoint": "Checkpoint CheckpointError CheckpointWriter TensorInfo",
    "papers": "all_papers get Paper Claim Measurement Verdict Scale",
    "atlas": "reproduce build_page",
}


SUB_HOMES = {"poincare", "operators", "lemon", "pde", "sampled", "tensor_product"}


def in_fresh_python(code):
    """What ``code`` prints, as JSON; nothing that pytest has loaded is there."""
    return json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))


def modules_after(statement):
    """All modules that a fresh interpreter has loaded after this statement."""
    return set(in_fresh_python(f"import sys, json\n{statement}\nprint(json.dumps([*sys.modules]))"))


def packages(modules):
    """Their top-level names."""
    return {name.partition(".")[0] for name in modules}


def test_the_bare_import_loads_nothing_heavy():
    loaded = modules_after("import stiefel")
    assert "stiefel" in loaded
    assert packages(loaded) & HEAVY == set()
    assert {name for name in loaded if name.startswith("stiefel.")} == set()


def test_the_list_of_papers_needs_no_figure_and_no_page():
    loaded = modules_after("import stiefel.papers; stiefel.papers.all_papers()")
    assert packages(loaded) & {"matplotlib", "jinja2", "sklearn", "transformers"} == set()


# Imports what every home may assume, then each home in a fork of its own: starting torch once is
# enough, and no home sees what another has loaded.
FORKS = """
import importlib, json, os, sys, time
import torch, numpy, jaxtyping

def once(home):
    read, write = os.pipe()
    if os.fork() == 0:
        before = set(sys.modules)
        start = time.process_time()
        importlib.import_module(f"stiefel.{home}")
        seconds = time.process_time() - start
        with os.fdopen(write, "w") as pipe:
            json.dump([seconds, sorted(set(sys.modules) - before)], pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found = json.load(pipe)
    os.wait()
    return found

runs = {home: [once(home) for _ in range(5)] for home in sys.argv[1:]}
print(json.dumps({home: [sorted(r[0] for r in found)[2], found[0][1]]
                  for home, found in runs.items()}))
"""


@pytest.fixture(scope="module")
def imports():
    """CPU seconds (median of five, as other processes share the cores) and modules by home."""
    code = [sys.executable, "-c", FORKS, *METHODS]
    return json.loads(subprocess.check_output(code, text=True))


@pytest.mark.parametrize("home", METHODS)
def test_methods_load_only_torch_and_shapes(home, imports):
    loaded = packages(imports[home][1])
    assert loaded - sys.stdlib_module_names == {"stiefel"}


@pytest.mark.parametrize("home", METHODS)
def test_methods_cost_at_most_150_ms_beyond_torch(home, imports):
    seconds = imports[home][0]
    assert seconds <= 0.150, f"{1000 * seconds:.0f} ms"


def public(home):
    """Names and values that a home offers: no modules, nothing that starts with ``_``."""
    module = importlib.import_module(f"stiefel.{home}")
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


@pytest.mark.parametrize("home", PROMISED)
def test_promised_names_are_there(home):
    module = importlib.import_module(f"stiefel.{home}")
    names = PROMISED[home].split()
    assert [name for name in names if not hasattr(module, name)] == []
    # A file named like what it holds hides it.
    modules = {name for name in names if isinstance(getattr(module, name), types.ModuleType)}
    assert modules <= SUB_HOMES


@pytest.mark.parametrize("home", [*METHODS, "papers", "atlas", "data"])
def test_public_names_are_explained(home):
    """Its own docstring, not the signature that ``dataclass`` puts where there is none."""
    ours = {
        name: value
        for name, value in public(home).items()
        if callable(value) and getattr(value, "__module__", "").startswith("stiefel")
    }
    assert ours, f"stiefel.{home} offers nothing"
    bare = [
        name
        for name, value in ours.items()
        if not value.__doc__ or re.match(rf"{value.__name__}\(", value.__doc__)
    ]
    assert bare == []


def test_homes_load_when_touched():
    code = "\n".join(
        [
            "import sys, json, stiefel",
            "before = 'stiefel.linalg' in sys.modules",
            "stiefel.linalg.polar",
            "print(json.dumps([before, 'stiefel.linalg' in sys.modules, dir(stiefel)]))",
        ]
    )
    before, after, names = in_fresh_python(code)
    assert (before, after) == (False, True)
    assert {"linalg", "optim", "papers", "atlas", "data", "__version__"} <= set(names)


def test_an_unknown_home_is_an_attribute_error():
    import stiefel

    with pytest.raises(AttributeError, match="no attribute 'linalgebra'"):
        _ = stiefel.linalgebra
