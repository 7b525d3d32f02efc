# `pip install openenv-core`; `make setup` installs the rest.

"""
The guessing game as an environment of OpenEnv, which a server runs: replays, for a session cannot be copied.

    python examples/scripts/openenv_game.py --max_steps 5

The server is started here, on this computer alone. Where the game runs elsewhere, only the address differs. A path
that parts from others behind a guess gets a session of its own, in which the guesses so far are made again.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from socket import create_server
from typing import Any

import uvicorn
from guessing_game import LARGEST, GameConfig, games
from openenv.core import GenericEnvClient
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from transformers import AutoTokenizer
from trl import ModelConfig, TrlParser, get_peft_config
from trl.chat_template_utils import qwen2_5_chat_template

from treepo_trl import TreePOTrainer
from treepo_trl.quickstart import small_model


# The server's side


class Guess(Action):
    """What a player does."""

    number: int


class Shown(Observation):
    """What a player sees; `reward` is a field of every observation."""

    text: str


class NumberGame(Environment[Guess, Shown, State]):
    """A number between 1 and 15, to be found with few guesses."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, number: int = 1, **_: Any) -> Shown:
        """Start a game about a number."""
        self.number, self.num_guesses, self.best = number, 0, 0.0
        return Shown(text=f"I think of a number between 1 and {LARGEST}. Guess it.", reward=0.0)

    def step(self, action: Guess, timeout_s: float | None = None, **_: Any) -> Shown:
        """Answer a guess. The reward is 1 for the number, less a tenth per guess; else how near the best guess was."""
        self.num_guesses += 1
        distance = abs(action.number - self.number)
        self.best = max(self.best, 0.5 * (1 - min(distance / LARGEST, 1)))
        if distance == 0:
            return Shown(text="Yes.", reward=1.0 - 0.1 * self.num_guesses, done=True)
        return Shown(text=f"It is {'larger' if action.number < self.number else 'smaller'}.", reward=self.best)

    @property
    def state(self) -> State:
        """How many guesses were made."""
        return State(step_count=self.num_guesses)


@contextmanager
def served(max_sessions: int) -> Iterator[str]:
    """Context in which a server runs the game in a thread; gives its address."""
    app = create_fastapi_app(NumberGame, Guess, Shown, max_concurrent_envs=max_sessions)
    # OpenEnv's server closes a socket that the client has closed already, and uvicorn would log that as an error.
    # Errors of the game reach the client.
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    listening = create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


# The trainer's side


class RemoteGame:
    """What the trainer plays: a session on the server."""

    def __init__(self, address: str) -> None:
        self._client = GenericEnvClient(base_url=address).sync()
        self._reward = 0.0

    def reset(self, number: int, **_: object) -> str:
        """Start a game; the number comes from the example, so every reset of it is the same game."""
        self._reward = 0.0
        return self._client.reset(number=number).observation["text"]

    def guess(self, number: int) -> str:
        """
        Guesses the number.

        Args:
            number: The guess.
        """
        result = self._client.step({"number": int(number)})
        self._reward = float(result.reward or 0)
        return result.observation["text"]

    def get_reward(self) -> float:
        """What the server gave for the last guess."""
        return self._reward

    def _close(self) -> None:
        self._client.close()


@contextmanager
def sessions(address: str) -> Iterator[Callable[[], RemoteGame]]:
    """Context that gives what makes games on a server; all are closed in the end, also those that are used again."""
    with ExitStack() as opened:

        def game() -> RemoteGame:
            made = RemoteGame(address)
            opened.callback(made._close)
            return made

        yield game


@dataclass
class OpenEnvConfig(GameConfig):
    """Settings of the training; those that differ from the guessing game's are here."""

    output_dir: str | None = field(default="outputs/openenv-game")
    environment_forking: str = field(default="replay")


if __name__ == "__main__":
    training_args, model_args = TrlParser((OpenEnvConfig, ModelConfig)).parse_args_and_config()
    model_path = model_args.model_name_or_path or small_model(".cache/smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = qwen2_5_chat_template
    num_prompts = training_args.max_steps * training_args.generation_batch_size // training_args.num_generations
    with served(2 * training_args.generation_batch_size) as address, sessions(address) as game:
        trainer = TreePOTrainer(
            model=model_path,
            args=training_args,
            train_dataset=games(num_prompts, training_args.seed),
            processing_class=tokenizer,
            environment_factory=game,
            peft_config=get_peft_config(model_args),
        )
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    for log in trainer.state.log_history:
        if "reward" in log:
            print(
                f"reward {log['reward']:.2f}, guesses per completion {log['tools/call_frequency']:.2f}, "
                f"executed {log['tree/tool_calls']:.0f}, of these replayed {log['environment/replayed_calls']:.0f}"
            )
