"""Command lines as people write them: what each says of a run, and what is refused in one line."""

from __future__ import annotations

import pytest

from moeplan.base.errors import InputError
from moeplan.diagnosis.calls.call import ALL_LAYERS, quant_in, served_quant_in
from moeplan.diagnosis.calls.read import read_command
from moeplan.diagnosis.origin import Asked, case_of_call


def test_the_command_of_a_server() -> None:
    call = read_command("llama-server -ngl 99 --n-cpu-moe 28 -c 16384 -ub 512")
    assert (call.engine, call.gpu_layers, call.cpu_moe_layers, call.context, call.ubatch, call.placed) == (
        "llama.cpp", 99, 28, 16384, 512, True,
    )  # fmt: skip
    assert (call.threads, call.kv_types, call.uploads, call.prompt, call.reply) == (
        None,
        ("f16", "f16"),
        True,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("llama-server", {"placed": False, "gpu_layers": None}),
        ("llama-server --fit off", {"placed": True}),
        ("llama-server -ngl auto", {"placed": False}),
        ("llama-bench --fit-target 1024 --fit-ctx 16384", {"placed": False, "fit_free_mib": 1024, "context": 16384}),
        ("llama-server -fitt 512 -fitc 4096 -c 9000", {"placed": False, "fit_free_mib": 512, "context": 9000}),
        ("llama-server -fitt 512 -ngl 99", {"placed": True, "fit_free_mib": None, "context": None,
        "remarks": ("-fitt stays out of the way where layers are placed by hand",)}),
        ("llama-server -ngl all -cmoe", {"cpu_moe_layers": ALL_LAYERS, "gpu_layers": None, "placed": True}),
        ("llama-server -ub 4096", {"ubatch": 2048}),
        ("llama-server -ub 4096 -b 4096", {"ubatch": 4096}),
        ("llama-server -nopo -ngl 99 -fa on -ctk q8_0 -ctv q4_0 -t 12", {"uploads": False, "kv_types": ("q8_0", "q4_0"), "threads": 12}),
        ("./build/bin/llama-server.exe -m C:\\models\\x-UD-Q2_K_XL-00001-of-00002.gguf", {"quant": "UD-Q2_K_XL"}),
        ("llama-cli -hf ggml-org/gpt-oss-120b-GGUF:MXFP4 -p 'why is it slow' -n 64", {"quant": "MXFP4", "reply": 64}),
        ("llama-bench -m x-Q4_K_M.gguf -p 2048 -n 0 -d 8192 -fa 1 -ncmoe 24", {"prompt": 2048, "reply": 0, "depth": 8192,
        "quant": "Q4_K_M"}),
        ("llama-bench -pg 4096,256", {"prompt": 4096, "reply": 256}),
        ("llama-server -m a.gguf -fmoe -rtr -ngl 99 -ot exps=CPU", {"engine": "ik_llama.cpp", "repacked": True, "overrides": (("exps",
        "CPU"),)}),
        ("CUDA_VISIBLE_DEVICES=0 numactl --interleave=all llama-server \\\n  -ngl 99 ^\n --cpu-moe", {"cpu_moe_layers": ALL_LAYERS}),
        ("-ngl 99", {"program": "llama-server", "gpu_layers": 99}),
        ("llama-server -dev Vulkan0", {"backend": "vulkan"}),
        ("llama-server -dev none", {"backend": "cpu"}),
        ("vllm serve Qwen/Qwen3-30B-A3B-AWQ --quantization awq_marlin --max-model-len=8192", {"engine": "vllm", "quant": "AWQ",
        "context": 8192}),
        ("python -m sglang.launch_server --model-path m --kv-cache-dtype fp8_e5m2", {"engine": "sglang", "kv_types": ("fp8_e5m2",
        "fp8_e5m2")}),
        (
            "python -m sglang.launch_server --model m --kt-method AMXINT4 --kt-num-gpu-experts 20 --kt-cpuinfer 60 --kt-threadpool-count 2",
            {"engine": "ktransformers", "gpu_experts": 20, "threads": 60, "quant": "INT4"},
        ),
        (
            "python ktransformers/local_chat.py --model_path deepseek-ai/DeepSeek-V3 --gguf_path ./DeepSeek-V3-Q4_K_M --cpu_infer 33",
            {"engine": "ktransformers", "cpu_moe_layers": ALL_LAYERS, "threads": 33, "quant": "Q4_K_M"},
        ),
        ("llama-server -ngl 99", {"cards": None, "parallel": None, "card_shares": ()}),
        ("llama-server -dev CUDA0,CUDA2 -sm row -ts 3,1", {"cards": (0, 2), "parallel": "row", "card_shares": (3.0, 1.0)}),
        ("llama-server -sm none -mg 1", {"cards": (1,), "parallel": None}),
        ("llama-server -sm none -mg 1 -ts 1,1", {"cards": (1,), "card_shares": ()}),
        ("CUDA_VISIBLE_DEVICES=2,0 llama-server -ts 1/2", {"cards": (2, 0), "card_shares": (1.0, 2.0)}),
        ("env HIP_VISIBLE_DEVICES=3,1 llama-cli -dev ROCm1", {"cards": (1,), "backend": "rocm"}),
        ("vllm serve m", {"cards": (0,), "parallel": None}),
        ("ollama run qwen3:30b-a3b-q8_0 --verbose", {"engine": "ollama", "model": "qwen3:30b-a3b-q8_0", "quant": "Q8_0", "placed": False}),
        ("OLLAMA_CONTEXT_LENGTH=64000 OLLAMA_KV_CACHE_TYPE=q8_0 OLLAMA_NUM_PARALLEL=2 ollama serve",
         {"engine": "ollama", "model": None, "context": 64_000, "slots": 2, "kv_types": ("q8_0", "q8_0")}),
        ("vllm serve m -tp 4", {"cards": (0, 1, 2, 3), "parallel": "tensor"}),
        ("CUDA_VISIBLE_DEVICES=6,7 python -m sglang.launch_server --model m --pp-size 2", {"cards": (6, 7), "parallel": "layer"}),
    ],
)  # fmt: skip
def test_what_commands_say(text: str, said: dict[str, object]) -> None:
    call = read_command(text)
    assert {name: getattr(call, name) for name in said} == said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llama-server --n-cpu-mo 3", "--command: flag = '--n-cpu-mo': llama-server has no such flag; did you mean --n-cpu-moe?"),
        ("llama-srver -ngl 9", "did you mean 'llama-server'?"),
        ("llama-server -ngl", "takes a value here"),
        ("llama-server -ngl 99 -ngl 98", "given twice, first with 99"),
        ("llama-server -ngl many", "not a whole number"),
        ("llama-server -ngl 99 --cpu-moe --n-cpu-moe 3", "keeps all experts on the cores already"),
        ("llama-server -ctv q4_0 -fa off", "need flash attention"),
        ("llama-server -ctk q3_0", "not one of"),
        ("llama-server --op-offload --no-op-offload", "says the opposite"),
        ("llama-server -dev none -ngl 99", "leaves no card"),
        ("llama-server -dev CUDA0,CUDA0", "named twice"),
        ("llama-server -dev CUDA0,Vulkan0", "not cards of one back end"),
        ("llama-server -dev card", "not cards of one back end"),
        ("llama-server -ts 1,x", "not a share for each card"),
        ("llama-server -sm rows", "not predicted"),
        ("CUDA_VISIBLE_DEVICES=1 vllm serve m -tp 2", "the program sees 1"),
        ("llama-server -nkvo", "not predicted"),
        ("llama-server -fitt 1024,512", "several cards"),
        ("llama-server -md draft.gguf", "drafted tokens are not predicted"),
        ("llama-server --moe-cache-mib 4096", "not predicted yet"),
        ("llama-server --rpc host:1", "several machines"),
        ("llama-server model.gguf", "takes flags only"),
        ("llama-server -ot exps", "not an expression"),
        ("llama-bench -p 512,1024", "several tests in one command"),
        ("llama-bench -pg 512", "not a prompt and a reply"),
        ("llama-bench -c 4096", "has no such flag"),
        ("vllm serve m -dp 2", "not predicted"),
        ("OLLAMA_CONTEXT_LENGTH=many ollama run m", "not a whole number"),
        ("OLLAMA_KV_CACHE_TYPE=q8_0 OLLAMA_FLASH_ATTENTION=0 ollama run m", "switched off"),
        ("ollama run m --keepalive", "takes a value"),
        ("vllm serve m -tp 2 -pp 2", "leave one of the two out"),
        ("vllm serve m --cpu-offload-gb 8", "not predicted"),
        ("vllm serve m --max-model-length 8", "did you mean --max-model-len?"),
        ("python -m sglang.launch_server --model m --kt-method AMXINT4", "is not said"),
        ("", "empty"),
        ("llama-server 'x", "a quote is not closed"),
        ("llama-server " + "-v " * 10_000, "characters"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_command(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_engine_that_is_not_of_the_program_is_refused() -> None:
    assert read_command("llama-server -ngl 99", "ik_llama.cpp").engine == "ik_llama.cpp"
    with pytest.raises(InputError, match="is of vllm"):
        read_command("vllm serve m", "llama.cpp")


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Qwen3-30B-A3B-Q4_K_M.gguf", "Q4_K_M"), ("gpt-oss-120b-mxfp4-00001-of-00003.gguf", "MXFP4"),
        ("unsloth/GLM-4.5-Air-GGUF:UD-Q2_K_XL", "UD-Q2_K_XL"),
        ("qwen3-30b.IQ4_XS.gguf", "IQ4_XS"), ("model.gguf", None), (None, None), ("D:\\m\\DeepSeek-R1-UD-IQ1_S\\x.gguf", None),
    ],
)  # fmt: skip
def test_the_weight_format_in_a_name(name: str | None, quant: str | None) -> None:
    assert quant_in(name) == quant


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Qwen/Qwen3-30B-A3B-FP8", "FP8"), ("Qwen/Qwen3-30B-A3B-GPTQ-Int4", "GPTQ-Int4"), ("cpatonn/Qwen3-Next-80B-A3B-AWQ-4bit", "AWQ"),
        ("nvidia/DeepSeek-R1-0528-NVFP4", "NVFP4"), ("nvidia/Qwen3-235B-A22B-FP4", "NVFP4"), ("/models/Qwen3-30B-A3B", None), (None, None),
    ],
)  # fmt: skip
def test_the_weight_format_in_the_name_of_a_served_checkpoint(name: str | None, quant: str | None) -> None:
    assert served_quant_in(name) == quant
    if name is not None:
        assert read_command(f"vllm serve {name}").quant == quant


def test_what_fitting_leaves_free_decides_how_many_layers_stay_on_the_cores() -> None:
    asked = Asked(model="gpt-oss-120b", hardware="rtx-3090 + ryzen-9-7950x + ddr5-6000x2:96GiB")
    told = ("", " --fit-target 1024", " --fit-target 6144", " --fit-ctx 65536")
    least, same, roomy, long = (
        case_of_call(read_command(f"llama-server{more}"), asked).placement["cpu_layers"] for more in told
    )
    assert least == same < roomy and least < long
