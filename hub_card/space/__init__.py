"""The demo page: `vreflection space` starts it here, `app.py` on a Space of the Hub. Only `page` needs gradio."""
