"""Chat with a model in the browser, and look into it.

uv run python phase10_deployment/project30_gradio/app.py
uv run python phase10_deployment/project30_gradio/app.py --checkpoint checkpoints/speedrun/dpo/best.pt
uv run python phase10_deployment/project30_gradio/app.py --lora polite=checkpoints/project5/adapter
uv run python phase10_deployment/project30_gradio/app.py --api_url http://127.0.0.1:8000/v1 --api_key secret

Without --api_url the model runs in a process beside the page, and the API of project 28 is at the same address under
/v1. With it, the page talks to a server that runs already; panels that look into the engine then say that they cannot.
"""

import contextlib
import functools
import os
import socket
from pathlib import Path

from common.run import Run
from phase10_deployment.project28_serving.options import engine_options, server_options
from phase10_deployment.project30_gradio import config


def main(argv=None):
    """Run the script."""
    with Run(config, argv, description=__doc__, quiet=True) as run:
        s = run.settings
        keys = [*s.API_KEY, *filter(None, os.environ.get("LLM_ROADMAP_API_KEYS", "").split(","))]
        port = s.PORT or free_port(s.HOST)
        page = f"http://{reachable(s.HOST)}:{port}"
        if s.API_URL is not None:
            run.print(f"the page is at {page}, the model at {s.API_URL}")
            serve_page(build_app(s.API_URL, keys[0] if keys else None, defaults=s), s, port)
        else:
            options = engine_options(s)
            run.print(f"loading {options.checkpoint}; the page is at {page}, the API at {page}/v1")
            serve_both(options, s, port, keys, run.print)


def build_app(api_url, api_key=None, client=None, defaults=config):
    """The page, as a `gradio.Blocks`: a chat, and the playground.

    Args:
        api_url: of a server with OpenAI's interface, such as http://127.0.0.1:8000/v1; api_key: if it wants one.
        client: project 28's `EngineClient` of the engine behind that server, if it is one of this process.
        defaults: TITLE, and the first values of the chat's controls.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nobody else need know that a page was opened
    import gradio as gr

    from phase10_deployment.project30_gradio.backend import Backend
    from phase10_deployment.project30_gradio.chat_tab import build_chat_tab
    from phase10_deployment.project30_gradio.playground import build_playground
    from phase10_deployment.project30_gradio.status import build_status
    from phase10_deployment.project30_gradio.talking import Api

    backend = Backend(Api(api_url, api_key), client)
    with gr.Blocks(title=defaults.TITLE, analytics_enabled=False, fill_width=False) as page:
        model = build_status(backend, page, defaults.TITLE)
        with gr.Tabs():
            with gr.Tab("Chat"):
                build_chat_tab(backend, page, model, defaults)
            with gr.Tab("Playground", elem_id="playground"):
                build_playground(backend, model)

        def leave(request: gr.Request):
            backend.stops.stop(request.session_hash)

        page.unload(leave)
    return page.queue(default_concurrency_limit=64, api_open=False)


def mounted(app, page):
    """An app of FastAPI with the page at its root."""
    import gradio as gr

    return gr.mount_gradio_app(
        app, page, path="/", theme=theme(), css=Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
        footer_links=[], show_error=True, ssr_mode=False, pwa=False, enable_monitoring=False,
    )  # fmt: skip


def theme():
    """Calm, and with the fonts of whoever looks at it: none is fetched."""
    import gradio as gr

    fonts = {"font": ["ui-sans-serif", "system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    plain = {"block_title_background_fill": "transparent", "block_title_text_color": "*neutral_600",
             "block_title_padding": "0", "block_title_text_weight": "500", "block_border_width": "1px",
             "block_shadow": "none", "input_border_width": "1px"}  # fmt: skip
    for name in ("block_title_background_fill", "block_border_width", "input_border_width"):
        plain[f"{name}_dark"] = plain[name]
    plain["block_title_text_color_dark"] = "*neutral_300"
    return gr.themes.Soft(primary_hue="blue", secondary_hue="blue", neutral_hue="slate", **fonts).set(**plain)


def serve_page(page, s, port):
    """Serve the page alone, until a signal ends it."""
    import uvicorn
    from fastapi import FastAPI

    uvicorn.run(mounted(FastAPI(), page), host=s.HOST, port=port, log_level=s.LOG_LEVEL, timeout_graceful_shutdown=3)


def serve_both(options, s, port, keys, said):
    """Serve the page, and the API beside it, over an engine in a process of its own."""
    from phase10_deployment.project28_serving.client import EngineClient
    from phase10_deployment.project28_serving.engine import build_engine
    from phase10_deployment.project28_serving.server import create_app
    from phase10_deployment.project28_serving.shutdown import run_server

    client = EngineClient(functools.partial(build_engine, options), silence=s.SILENT_SECONDS)
    api = create_app(client, server_options(s, options.checkpoint))
    url = f"http://{reachable(s.HOST)}:{port}/v1"
    app = beside(api, build_app(url, keys[0] if keys else None, client, s))
    run_server(app, s.HOST, port, s.DRAIN_SECONDS, s.LOG_LEVEL, said)


def beside(api, page):
    """One app of both: the API's paths are the API's, all others the page's."""
    from fastapi import FastAPI

    from phase10_deployment.project30_gradio.status import Beside

    @contextlib.asynccontextmanager
    async def lifespan(app):
        async with api.router.lifespan_context(api):
            yield

    app = mounted(FastAPI(lifespan=lifespan), page)
    app.state.server = api.state.server
    app.add_middleware(Beside, api=api)
    return app


def reachable(host):
    """An address of this machine that leads to what listens at `host`.

    >>> reachable("0.0.0.0"), reachable("::1"), reachable("localhost")
    ('127.0.0.1', '[::1]', 'localhost')
    """
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def free_port(host):
    """A port that nobody listens at."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
