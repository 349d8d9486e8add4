"""Pictures of episodes: GIFs and attention weights.

Letters: T steps of the episode, L layers, H heads, M = WINDOW_MEM.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw
from tqdm import tqdm

from trxl.environments.validation import require
from trxl.errors import ConfigError, shortened
from trxl.runs.agent import Agent
from trxl.runs.evaluation import MAX_STEPS, endless, make_loop

FRAME_MILLISECONDS = 100
CAPTION_PIXELS = 18
LEAST_PIXELS = 160  # minimum width and height of a picture, for the caption to fit


def with_caption(pixels: np.ndarray, text: str) -> Image.Image:
    """Adds a caption below a picture (height, width, 3) uint8, enlarging small pictures."""
    enlarged = max(1, LEAST_PIXELS // min(pixels.shape[:2]))
    pixels = pixels.repeat(enlarged, axis=0).repeat(enlarged, axis=1)
    height, width, _ = pixels.shape
    picture = Image.new("RGB", (width, height + CAPTION_PIXELS))
    picture.paste(Image.fromarray(pixels))
    ImageDraw.Draw(picture).text((4, height + 3), text, fill="white")
    return picture


def write_gif(path: Path, frames: list[Image.Image]) -> None:
    """Writes pictures as a looping GIF."""
    first, *others = [frame.quantize(64) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=FRAME_MILLISECONDS, loop=0)


def check_writable(key: str, path: Path, suffix: str) -> None:
    """Raises a ConfigError if a file has another suffix or can't be written."""
    if path.suffix.lower() != suffix:
        raise ConfigError(f"{key}: {path} must end in {suffix}")
    there = path.exists()
    try:
        open(path, "ab").close()
    except OSError as error:
        raise ConfigError(f"{key}: can't write to {path}: {error.strerror}") from error
    if not there:
        path.unlink()


MOST_PICTURES = 10
"""Largest number of pictures below an attention matrix."""

MOST_FRAMES = 400
"""Largest number of frames of an animation; longer episodes are subsampled."""


def check_gif(agent: Agent, path: Path) -> None:
    """Checks that `save_gif` can succeed.

    Raises:
      ConfigError: the file can't be written, or the environment can't be drawn.
    """
    check_writable("GIF", path, ".gif")
    env = agent.environment()
    start, _ = make_loop(agent, env)  # fills the compilation cache for `save_gif`
    state, *_ = start(jax.random.key(0))
    render = env.renderer()
    require("GIF", callable(render), "renderer() must return a function", shortened(render))
    picture = np.asarray(render(jax.tree.map(lambda x: x[0], env.single_states(state))))
    if picture.shape[2:] != (3,) or picture.dtype != np.uint8:
        raise ConfigError(
            "GIF: a picture must be uint8 of shape (height, width, 3), not"
            f" {picture.dtype} of shape {picture.shape}"
        )


def save_gif(agent: Agent, path: Path, key: jax.Array, max_steps: int = MAX_STEPS) -> float:
    """Plays one episode, or one trial of several, and writes it as a GIF.

    Captions show the step, the episode's return so far and, in trials, the episode's number.

    Returns:
      the return of the episode or trial.

    Raises:
      ConfigError: the environment can't be drawn, or an episode has more than `max_steps`.
    """
    env = agent.environment()
    start, step = make_loop(agent, env)
    step, render = jax.jit(step), env.renderer()
    carry = start(jax.random.fold_in(key, 0))
    frames: list[Image.Image] = []
    returns = [0.0]  # per episode
    begun = 0  # first frame of the current episode

    def caption() -> str:
        number = f"episode {len(returns)}  " if env.episodes_per_trial > 1 else ""
        return f"{number}step {len(frames) - begun}  return {returns[-1]:.1f}"

    with tqdm(unit="step") as bar:
        while len(returns) <= env.episodes_per_trial:
            state = jax.tree.map(lambda x: x[0], env.single_states(carry[0]))
            picture = render(state)
            frames.append(with_caption(picture, caption()))
            carry, ((done,), (reward,), _) = step(carry, jax.random.fold_in(key, len(frames)))
            returns[-1] += float(reward)
            bar.update()
            if done:  # the last frame shows the final return
                frames[-1] = with_caption(picture, caption())
                returns.append(0.0)
                begun = len(frames)
            if len(frames) - begun > max_steps:
                raise endless(max_steps)
    write_gif(path, frames)
    return sum(returns)


class Episode(NamedTuple):
    """Observations and attention of an episode, or of a trial of several."""

    observations: np.ndarray  # (T, obs_size)
    pictures: list[np.ndarray]  # T of (height, width, 3) uint8; empty without a renderer
    attention: np.ndarray  # (L, T, T), [l, i, j]: weight of step i on step j; 0 for j > i
    rewards: np.ndarray  # (T,)
    ends: np.ndarray  # (T,) bool, last steps of episodes


def check_attention(agent: Agent, path: Path) -> None:
    """Checks that the agent has attention, and that the file can be written.

    Raises:
      ConfigError: either is not the case.
    """
    kind = agent.config["MEMORY"]
    names = ("num_layers", "WINDOW_MEM")
    if kind != "transformer" or not all(agent.config[name] for name in names):
        given = ", ".join(f"{name}={agent.config[name]}" for name in ("MEMORY", *names))
        raise ConfigError(
            f"ATTENTION: this agent attends to nothing before the step it is in ({given})"
        )
    check_writable("ATTENTION", path, ".gif" if path.suffix.lower() == ".gif" else ".png")


def record(agent: Agent, key: jax.Array, max_steps: int = MAX_STEPS) -> Episode:
    """Plays until the next memory boundary, recording attention weights.

    Raises:
      ConfigError: the episode or trial has more than `max_steps`.
    """
    env = agent.environment()
    start, step = make_loop(looking(agent), env)
    step = jax.jit(step)
    carry = start(jax.random.fold_in(key, 0))
    render = renderer(env, carry[0])
    observations, pictures, rewards, ends = [], [], [], []
    looks: list[np.ndarray] = []
    over = False
    with tqdm(unit="step") as bar:
        while not over:
            observations.append(np.asarray(carry[1][0]))
            if render:
                pictures.append(render(jax.tree.map(lambda x: x[0], env.single_states(carry[0]))))
            carry, ((done,), (reward,), _) = step(carry, jax.random.fold_in(key, len(looks) + 1))
            looks.append(np.asarray(carry[3][1][0]).mean(axis=1))  # (L, M+1), by age
            rewards.append(float(reward))
            ends.append(bool(done))
            over = bool(carry[2][0])
            bar.update()
            if len(looks) > max_steps:
                raise endless(max_steps)
    return Episode(
        np.stack(observations), pictures, by_step(looks), np.array(rewards), np.array(ends)
    )


def looking(agent: Agent) -> Agent:
    """Returns the agent with memory (memory, attention weights of the last step)."""

    def initial_memory(batch: int) -> tuple[Any, Any]:
        config = agent.config
        shape = (batch, config["num_layers"], config["num_heads"], config["WINDOW_MEM"] + 1)
        return agent.initial_memory(batch), jax.numpy.zeros(shape, jax.numpy.float32)

    def act(memory: Any, obs: jax.Array, done: jax.Array, key: jax.Array):
        action, memory, attention = agent.look(memory[0], obs, done, key)
        return action, (memory, attention)

    return agent._replace(initial_memory=initial_memory, act=act)


def renderer(env: Any, state: Any) -> Callable | None:
    """Returns the environment's renderer, None if it has none."""
    try:
        render = env.renderer()
        render(jax.tree.map(lambda x: x[0], env.single_states(state)))
    except ConfigError:
        return None
    return render


def by_step(looks: list[np.ndarray]) -> np.ndarray:
    """Converts T attention weights (L, M+1), by age, to (L, T, T), by step."""
    steps, layers = len(looks), len(looks[0])
    attention = np.zeros((layers, steps, steps))
    for i, look in enumerate(looks):
        reach = min(i + 1, look.shape[1])
        attention[:, i, i + 1 - reach : i + 1] = look[:, :reach][:, ::-1]
    return attention


def draw(path: Path, episode: Episode) -> None:
    """Draws an episode's attention: a matrix per layer, or an animation of steps for a .gif."""
    if path.suffix.lower() == ".gif":
        steps = np.arange(len(episode.rewards))
        chosen = steps[:: -(-len(steps) // MOST_FRAMES)]
        frames = [film_frame(episode, int(step)) for step in tqdm(chosen, unit="frame")]
        write_gif(path, frames)
    else:
        square_figure(episode).savefig(path, dpi=100)


def square_figure(episode: Episode) -> Figure:
    """Draws each layer's attention as a matrix, (attending step, attended step).

    Below are the observations, or some of the pictures, and the rewards.
    """
    layers, steps, _ = episode.attention.shape
    low = 1.2 if episode.pictures else 2
    figure = Figure(figsize=(min(5 * layers + 0.6, 15), 5 + low), layout="constrained")
    axes = figure.subplots(2, layers, squeeze=False, sharex=True, height_ratios=(5, low))
    for layer, (above, below) in enumerate(axes.T):
        image = above.imshow(
            episode.attention[layer], cmap="Reds", vmin=0, aspect="auto", interpolation="nearest"
        )
        figure.colorbar(image, ax=above, location="top", label=f"layer {layer + 1}: weight")
        draw_seen(below, episode)
        for panel in (above, below):
            panel.set(xlim=(-0.5, steps - 0.5))
            for end in np.flatnonzero(episode.ends)[:-1]:
                panel.axvline(end + 0.5, color="tab:blue", linewidth=0.8)
        for step in np.flatnonzero(episode.rewards)[:60]:
            below.axvline(step, color="tab:green", linewidth=1.5)
        above.yaxis.set_major_locator(MaxNLocator(integer=True))
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.set(xlabel="step attended to", yticks=[])
    axes[0, 0].set(ylabel="step that attends")
    axes[1, 0].set(ylabel="what was seen\n(green: reward)")
    return figure


def draw_seen(panel: Axes, episode: Episode) -> None:
    """Draws the observations as columns, or the pictures of some steps."""
    if not episode.pictures:
        seen = shown(episode.observations).T
        panel.imshow(seen, cmap="Greys", aspect="auto", interpolation="nearest")
        return
    steps = len(episode.pictures)
    width = max(1, steps / MOST_PICTURES)
    for left in np.arange(0, steps - 1e-9, width):
        step = min(int(left + width / 2), steps - 1)
        extent = (left - 0.5, left + width - 0.5, 0, 1)
        panel.imshow(episode.pictures[step], extent=extent, aspect="auto")
        panel.text(left + width / 2 - 0.5, 0.02, str(step), color="white", fontsize=7, ha="center")
    panel.set(ylim=(0, 1))


def film_frame(episode: Episode, step: int) -> Image.Image:
    """Draws a step, its attention, and the earlier step with the most attention."""
    layers, steps, _ = episode.attention.shape
    figure = Figure(figsize=(8, 1.6 + 1.5 * layers), layout="constrained", dpi=80)
    parts: Any = figure.subfigures(1, 2, width_ratios=(1, 2))
    left, right = parts
    past = episode.attention[:, step, :step].max(axis=0) if step else np.zeros(1)
    most = int(np.argmax(past))
    now, before = left.subplots(2, 1)
    for panel, index, name in ((now, step, "now"), (before, most, "looked at most")):
        panel.imshow(view(episode, index), cmap="Greys", interpolation="nearest", aspect="equal")
        panel.set_title(f"{name}: step {index}", fontsize=9)
        panel.axis("off")
    bars = right.subplots(layers, 1, squeeze=False, sharex=True)[:, 0]
    for layer, panel in enumerate(bars):
        colours = np.where(np.arange(steps) == step, "tab:gray", "tab:red")
        weights = episode.attention[layer, step]
        panel.bar(np.arange(steps), weights, width=1.0, color=colours.tolist())
        panel.set(xlim=(-0.5, steps - 0.5), ylim=(0, 1), ylabel=f"layer {layer + 1}")
        panel.axvline(step + 0.5, color="black", linewidth=0.8)
    bars[0].set_title("attention of this step over the steps so far", fontsize=9)
    bars[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    bars[-1].set_xlabel("step")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def view(episode: Episode, step: int) -> np.ndarray:
    """Returns a step's picture, else its observation as a matrix."""
    if episode.pictures:
        return episode.pictures[step]
    row = shown(episode.observations)[step]
    width = int(np.ceil(np.sqrt(len(row))))
    return np.pad(row, (0, -len(row) % width)).reshape(-1, width)


def shown(observations: np.ndarray) -> np.ndarray:
    """Scales each entry of observations (T, obs_size) to 0 .. 1."""
    low, high = observations.min(axis=0), observations.max(axis=0)
    return (observations - low) / np.where(high > low, high - low, 1)
