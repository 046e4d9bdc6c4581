//! Docker Engines on the lab's hosts, each with ovl's plugin.

use std::net::IpAddr;
use std::ops::{Deref, DerefMut};

use anyhow::{Context as _, Result};
use netns_lab::{Engine, Host};

use super::Place;
use super::image::{self, IMAGE};

/// An Engine with the image.
#[derive(Debug)]
pub struct Docker(Engine);

impl Docker {
    /// Everything that it needs.
    pub fn start(host: &Host, options: &[&str]) -> Result<Self> {
        let engine = Engine::start(host, options)?;
        let dir = host.dir().join("docker-image");
        std::fs::create_dir_all(&dir)?;
        let archive = image::make(&dir)?;
        engine.call(&["load", "--quiet", "--input", &archive.to_string_lossy()])?;
        Ok(Docker(engine))
    }

    /// Starts a container of that name, which serves, with further arguments.
    pub fn run(&self, name: &str, more: &[&str]) -> Result<DockerContainer<'_>> {
        // Killed and not asked to end: nothing in it does that.
        let own = ["run", "--detach", "--name", name, "--stop-signal", "SIGKILL"];
        self.call(&[&own, more, &[IMAGE]].concat())?;
        Ok(self.container(name))
    }

    /// A container that is there already.
    pub fn container(&self, name: &str) -> DockerContainer<'_> {
        DockerContainer { engine: &self.0, name: name.to_owned() }
    }
}

impl Deref for Docker {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        &self.0
    }
}

impl DerefMut for Docker {
    fn deref_mut(&mut self) -> &mut Engine {
        &mut self.0
    }
}

/// A container that runs.
#[derive(Debug)]
pub struct DockerContainer<'engine> {
    engine: &'engine Engine,
    name: String,
}

impl DockerContainer<'_> {
    /// The address that the Engine says it has on a network.
    pub fn told_address(&self, network: &str) -> Result<IpAddr> {
        let told = self.engine.inspect("container", &self.name)?;
        let text = told["NetworkSettings"]["Networks"][network]["IPAddress"].as_str().unwrap_or_default();
        text.parse().with_context(|| format!("{text:?} is no address of {}", self.called()))
    }
}

impl Place for DockerContainer<'_> {
    fn called(&self) -> String {
        format!("container {} on {}", self.name, self.engine.host().name())
    }

    fn command(&self, words: &[&str]) -> Result<String> {
        self.engine.call(&[&["exec", &self.name], words].concat())
    }
}
