"""What Streamlit runs: the menu of pages."""

import streamlit as st

from ldm.app.data import page as data
from ldm.app.export import page as export
from ldm.app.generate import page as generate
from ldm.app.judge import page as judge
from ldm.app.learn import page as learn
from ldm.app.train import page as train

st.set_page_config(page_title="ldm", layout="wide")
st.navigation(
    [
        st.Page(learn, title="Learn", url_path="learn", default=True),
        st.Page(data, title="Data", url_path="data"),
        st.Page(train, title="Train", url_path="train"),
        st.Page(generate, title="Generate", url_path="generate"),
        st.Page(judge, title="Judge", url_path="judge"),
        st.Page(export, title="Export", url_path="export"),
    ],
    position="top",
).run()
