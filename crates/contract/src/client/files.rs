//! The routes of files in machines.

use reqwest::{Method, RequestBuilder};

use super::routes::{NO_WAIT, optional, raw};
use super::{Body, Client, Download, Error, decode, stream};
use crate::file::{FileInfo, Written};
use crate::page::Page;

/// Where an upload goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Upload {
    /// Absolute path in the machine.
    pub path: String,
    /// Permission bits; what the guest gives to a new file when left out.
    pub mode: Option<u32>,
    /// `user` or `user:group`.
    pub owner: Option<String>,
    /// Make missing directories above it.
    pub parents: bool,
    /// How many bytes will be sent, when known: the server then refuses a body that breaks off.
    pub size_bytes: Option<u64>,
    /// Add to the file that is there.
    pub append: bool,
}

/// Files.
impl Client {
    /// `GET /v1/machines/{id}/files`: the bytes of a file, or a part of them.
    pub async fn read_file(
        &self,
        reference: &str,
        path: &str,
        offset: u64,
        length: Option<u64>,
    ) -> Result<Download, Error> {
        let request = self.file(Method::GET, reference, &["files"], path)?;
        let request = if offset > 0 {
            request.query(&[("offset", offset)])
        } else {
            request
        };
        self.download(optional(request, "length", length)).await
    }

    /// `PUT /v1/machines/{id}/files`: makes or replaces a file.
    pub async fn write_file(
        &self,
        reference: &str,
        upload: &Upload,
        body: Body,
    ) -> Result<Written, Error> {
        let request = self.file(Method::PUT, reference, &["files"], &upload.path)?;
        let request = optional(
            request,
            "mode",
            upload.mode.map(|mode| format!("{mode:04o}")),
        );
        let request = optional(request, "owner", upload.owner.as_deref());
        let request = optional(request, "parents", upload.parents.then_some(true));
        let request = optional(request, "append", upload.append.then_some(true));
        decode(self.send(raw(request, upload.size_bytes, body)).await?).await
    }

    /// `DELETE /v1/machines/{id}/files`.
    pub async fn remove_file(
        &self,
        reference: &str,
        path: &str,
        recursive: bool,
    ) -> Result<(), Error> {
        let request = self.file(Method::DELETE, reference, &["files"], path)?;
        self.nothing(optional(request, "recursive", recursive.then_some(true)))
            .await
    }

    /// `GET /v1/machines/{id}/files/stat`.
    pub async fn stat_file(&self, reference: &str, path: &str) -> Result<FileInfo, Error> {
        self.json(
            self.file(Method::GET, reference, &["files", "stat"], path)?,
            NO_WAIT,
        )
        .await
    }

    /// `GET /v1/machines/{id}/files/list`: one page of a directory.
    pub async fn list_files(
        &self,
        reference: &str,
        path: &str,
        cursor: Option<&str>,
        limit: Option<u32>,
    ) -> Result<Page<FileInfo>, Error> {
        let request = self.file(Method::GET, reference, &["files", "list"], path)?;
        self.json(
            optional(optional(request, "cursor", cursor), "limit", limit),
            NO_WAIT,
        )
        .await
    }

    /// `GET /v1/machines/{id}/files/list` of a directory and those below it, down to `depth` where that is given. A page
    /// may be empty and still have a next one.
    pub async fn list_tree(
        &self,
        reference: &str,
        path: &str,
        depth: Option<u32>,
        cursor: Option<&str>,
        limit: Option<u32>,
    ) -> Result<Page<FileInfo>, Error> {
        let request = self.file(Method::GET, reference, &["files", "list"], path)?;
        let request = optional(request.query(&[("recursive", true)]), "depth", depth);
        self.json(
            optional(optional(request, "cursor", cursor), "limit", limit),
            NO_WAIT,
        )
        .await
    }

    /// `GET /v1/machines/{id}/files/glob`: the paths below a directory that match. A page may be empty and still have a
    /// next one.
    pub async fn glob_files(
        &self,
        reference: &str,
        path: &str,
        pattern: &str,
        cursor: Option<&str>,
        limit: Option<u32>,
    ) -> Result<Page<FileInfo>, Error> {
        let request = self.file(Method::GET, reference, &["files", "glob"], path)?;
        let request = request.query(&[("pattern", pattern)]);
        self.json(
            optional(optional(request, "cursor", cursor), "limit", limit),
            NO_WAIT,
        )
        .await
    }

    /// `POST /v1/machines/{id}/files/move`: what is at `to` is replaced, or with `replace` false the reason for an error.
    pub async fn move_file(
        &self,
        reference: &str,
        path: &str,
        to: &str,
        replace: bool,
    ) -> Result<(), Error> {
        let request = self.file(Method::POST, reference, &["files", "move"], path)?;
        let request = request.query(&[("to", to)]);
        self.nothing(optional(request, "replace", (!replace).then_some(false)))
            .await
    }

    /// `POST /v1/machines/{id}/files/chmod`.
    pub async fn chmod_file(
        &self,
        reference: &str,
        path: &str,
        mode: u32,
        recursive: bool,
    ) -> Result<(), Error> {
        let request = self.file(Method::POST, reference, &["files", "chmod"], path)?;
        let request = request.query(&[("mode", format!("{mode:04o}"))]);
        self.nothing(optional(request, "recursive", recursive.then_some(true)))
            .await
    }

    /// `POST /v1/machines/{id}/files/chown`: `owner` is a user, or `user:group`.
    pub async fn chown_file(
        &self,
        reference: &str,
        path: &str,
        owner: &str,
        recursive: bool,
    ) -> Result<(), Error> {
        let request = self.file(Method::POST, reference, &["files", "chown"], path)?;
        let request = request.query(&[("owner", owner)]);
        self.nothing(optional(request, "recursive", recursive.then_some(true)))
            .await
    }

    /// `POST /v1/machines/{id}/files/mkdir`.
    pub async fn make_dir(&self, reference: &str, path: &str, parents: bool) -> Result<(), Error> {
        let request = self.file(Method::POST, reference, &["files", "mkdir"], path)?;
        self.nothing(optional(request, "parents", parents.then_some(true)))
            .await
    }

    fn file(
        &self,
        method: Method,
        reference: &str,
        route: &[&str],
        path: &str,
    ) -> Result<RequestBuilder, Error> {
        Ok(self.of(method, reference, route)?.query(&[("path", path)]))
    }

    pub(super) async fn download(&self, request: RequestBuilder) -> Result<Download, Error> {
        let response = self.send(request).await?;
        let mode = response
            .headers()
            .get("x-hutch-mode")
            .and_then(|mode| mode.to_str().ok());
        let mode = mode.and_then(|mode| u32::from_str_radix(mode, 8).ok());
        Ok(Download {
            size_bytes: response.content_length(),
            mode,
            bytes: stream(response),
        })
    }
}
