"""The app: pages of Streamlit over the library, to learn, draw and judge in a browser."""
