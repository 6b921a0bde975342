"""What Streamlit runs: the menu of pages."""

import streamlit as st

from ldm.app.menu import NAMES, keep_choices, menu_page

st.set_page_config(page_title="ldm", layout="wide")
keep_choices()
st.navigation([menu_page(name) for name in NAMES], position="top").run()
