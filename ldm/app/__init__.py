"""The app: pages of Streamlit over the library, to learn, train, draw and judge in a browser."""
