"""What Streamlit runs: the menu of pages."""

import streamlit as st

from ldm.app.learn import page as learn

st.set_page_config(page_title="ldm", layout="wide")
st.navigation([st.Page(learn, title="Learn", url_path="learn", default=True)]).run()
