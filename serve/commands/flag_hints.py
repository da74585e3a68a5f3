"""Hints for users of vLLM, SGLang and others: an unknown flag of theirs is answered with Manta's equivalent."""

from typing import Any

from typer.core import TyperCommand

HINTS = {
    "--host": "it is --http-host here, and --grpc-host",
    "--port": "it is --http-port here, and --grpc-port",
    "--model": "the model is an argument here: manta serve MODEL",
    "--served-model-name": "it is --name here",
    "--tensor-parallel-size": "it is --tensor-parallel here, or -t",
    "--pipeline-parallel-size": "it is --pipeline-parallel here",
    "--data-parallel-size": "it is --replicas here for copies of the model, --data-parallel for copies of the attention alone",
    "--enable-expert-parallel": "it is --expert-parallel here, with the number of groups",
    "--lora-modules": "it is --adapter PATH here, with --name NAME; one adapter per model, list several under `models:`",
    "--lora-paths": "it is --adapter PATH here, with --name NAME; one adapter per model, list several under `models:`",
    "--enable-lora": "leave it out: --adapter merges an adapter into the weights",
    "--max-lora-rank": "leave it out: any rank is supported",
    "--max-model-len": "it is --max-context-tokens here",
    "--context-length": "it is --max-context-tokens here",
    "--quantization": "it is --quantize here; a quantised checkpoint needs no flag",
    "--kv-cache-dtype": "it is --kv-dtype here",
    "--speculative-config": "it is --speculate here, with --draft-model",
    "--max-num-seqs": "it is --set engine.max_running=N here",
    "--max-num-batched-tokens": "it is --set engine.max_step_tokens=N here",
    "--chunked-prefill-size": "it is --set engine.max_step_tokens=N here",
    "--block-size": "it is --set engine.block_tokens=N here",
    "--gpu-memory-utilization": "it is --set runner.kv_memory_fraction=F here",
    "--mem-fraction-static": "it is --set runner.kv_memory_fraction=F here",
    "--enable-prefix-caching": "leave it out: prefixes are cached unless --set engine.prefix_cache=false",
    "--enable-auto-tool-choice": "leave it out: tool calls are always enabled",
    "--tool-call-parser": "it is --set tools.protocol=hermes or qwen_agent here; by default it follows from the model",
    "--trust-remote-code": "leave it out: code in a model's repository is never run",
    "--device": "it is --set runner.device=cpu here",
    "--gpus": "by default every rank gets a GPU if there are any; --set resources.gpus=0.5 lets two ranks share one",
    "--api-key": "keys are in a file here: manta keys create --name NAME, then --set auth.keys_file=manta-keys.json",
    "--seed": "seeds are set per request",
}
for long, short in (("--tensor-parallel-size", "--tp"), ("--pipeline-parallel-size", "--pp"), ("--data-parallel-size", "--dp")):
    HINTS[short] = HINTS[f"{short}-size"] = HINTS[long]
HINTS["--model-path"] = HINTS["--model"]
ANY_SETTING = "settings without a flag are set by --set SECTION.FIELD=VALUE; `manta config` lists them"


class CommandWithFlagHints(TyperCommand):
    """A command whose "No such option" error says what to write instead."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ == "NoSuchOption":  # click's class, or the one in typer's vendored copy of click
                no_such_option: Any = error
                help = HINTS.get(no_such_option.option_name, "" if no_such_option.possibilities else ANY_SETTING)
                if help:
                    no_such_option.message, no_such_option.possibilities = f"{no_such_option.message.rstrip('.')}; {help}", None
            raise
