"""The command ``purify``: one module for each subcommand."""

# Subcommand -> (module with main(argv, prog), what it does); imported when it is asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "attack": ("purify.cli.attack", "attack a purified classifier and report what holds"),
    "distortion": ("purify.cli.distortion", "the smallest radius at which purified classifiers fail, image by image"),
    "certify": ("purify.cli.certify", "certify smoothed classifiers, and attack them inside their radii"),
    "image": ("purify.cli.image", "purify pictures of your own"),
    "merge": ("purify.cli.merge", "shards of a run, run by independent processes, to the whole run"),
    "leaderboard": ("purify.cli.leaderboard", "finished runs to a page, Markdown, JSON and plots"),
    "compare": ("purify.cli.compare", "by how much defences of finished runs differ, image by image"),
    "list": ("purify.cli.list", "models, score models, purifiers, noise levels, attacks and data sets by name"),
    "calibrate": ("purify.cli.calibrate", "measure the score norm on clean images, for SSNI"),
    "check": ("purify.cli.check", "whether a diffusion model is wired as it was trained"),
    "download": ("purify.cli.download", "fetch public score networks"),
    "completion": ("purify.cli.completion", "what a shell needs to complete purify: bash or zsh"),
    "train": ("purify.train.__main__", "train a network of the embedded default, or one like it"),
}
